"""The description of an import that a separate process carries out; all of its inputs are downloaded already."""

from __future__ import annotations

from pathlib import Path

import msgspec

# to be incremented when the same sources would give another folder
CONVERTER_VERSION = 1
SOURCE = "SOURCE.json"


class Part(msgspec.Struct, frozen=True):
    """A repository or folder from which a model was made, as `SOURCE.json` lists it."""

    part: str  # "checkpoint", "language model", "vision model", or "model" for the whole
    repository: str
    commit: str
    license: str


class Origin(msgspec.Struct, frozen=True):
    """The content of `SOURCE.json`: where the model of a folder comes from."""

    # the branch, tag or commit that was named; "" for a local folder
    revision: str = ""
    # the first one has the model's name
    parts: tuple[Part, ...] = ()

    def to_json(self) -> str:
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"


class OpenFlamingo(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A `checkpoint.pt`, and the folders of its frozen experts."""

    checkpoint: str
    language_model: str
    vision_model: str
    every_n_layers: int


class Idefics(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The folder of an IDEFICS."""

    folder: str


class ModelFolder(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A published model folder."""

    folder: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """An import of `source` into the new folder `folder`; `name` is the model's name for clients."""

    name: str
    folder: str
    source: OpenFlamingo | Idefics | ModelFolder
    origin: Origin


def read_origin(folder: Path) -> Origin:
    """Return where the model of a folder comes from; an empty origin if no `SOURCE.json` says so."""
    try:
        return msgspec.json.decode((folder / SOURCE).read_bytes(), type=Origin)
    except (FileNotFoundError, msgspec.DecodeError):
        return Origin()
