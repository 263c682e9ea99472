"""The archive of a support set: a ZIP file with a manifest, the examples as JSON lines, and the bytes of their media.

    manifest.json     what the archive is: a `Manifest`
    examples.jsonl    an `ArchivedExample` per line, in the order of the set
    media/NAME        the original bytes of an image or a video; media that several examples show are stored once

Nothing in it depends on a model: vectors, evaluations, versions and lifetimes are not part of an archive.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from server.media.source import Kind
from server.schemas.base import SHA_256, Schema
from server.schemas.stored import MAX_NAMES, ExampleId, Metadata, SetName, StoredLabel, StoredText

FORMAT = "flamboyance.support_set"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
EXAMPLES = "examples.jsonl"
MEDIA_FOLDER = "media/"
MEDIA_FILE = re.compile(r"media/[\w-][\w.-]{0,200}", re.ASCII)

Count = Annotated[int, Field(ge=0)]


def _is_media_file(file: str) -> str:
    if MEDIA_FILE.fullmatch(file) is None:
        raise ValueError(
            "a media file is named media/NAME; NAME has 1 to 201 ASCII letters, digits and characters of _.-, and does not "
            "begin with a full stop"
        )
    return file


class Manifest(Schema):
    """The description of an archive. Where it came from is for readers; the counts must be right, if they are given."""

    format: Literal["flamboyance.support_set"]
    format_version: Literal[1]
    name: SetName | None = None
    metadata: Metadata = Field({})
    num_examples: Count | None = None
    num_media: Count | None = None
    exported_from: dict[str, Any] = Field({})


class ArchivedMedia(Schema):
    """A file of the archive that an example shows, with the SHA-256 of its bytes in hexadecimal digits."""

    type: Kind
    file: Annotated[str, AfterValidator(_is_media_file)]
    sha256: Annotated[str, Field(pattern=SHA_256)]


class ArchivedExample(Schema):
    """A worked example; the server gives it an id if it has none."""

    max_names: ClassVar[int] = MAX_NAMES
    id: ExampleId | None = None
    media: list[ArchivedMedia] = Field([], max_length=64)
    text: StoredText = ""
    question: StoredText = ""
    label: StoredLabel = ""
    metadata: Metadata = Field({})

    @model_validator(mode="after")
    def _shows_something(self) -> ArchivedExample:
        if not (self.media or self.text or self.label):
            raise ValueError("an example needs media, a text or a label")
        return self
