"""A record describes one image of the default model's data: its path, content, source and licence.

`data.jsonl` has one record per line; training and evaluation read the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from model.cache import cache_folder

DATA = "data.jsonl"
DEFAULT_FOLDER = cache_folder() / "default-data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    image: str  # path below the data folder
    label: str  # the name of what the image shows; "" if only the category is known
    category: str  # for example "animal mammal" or "food fruit"
    tags: tuple[str, ...]
    source: str
    licence: str
    style: str
    domain: Literal["drawing", "photograph"]
    trains: bool  # whether the source may be used for training
    digest: str = ""  # the SHA-256 of the image's file; "" if the folder was built without it


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Write the records at once: a source with a file of records counts as built."""
    lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records]
    partial = folder / f"{DATA}.partial"
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(folder / DATA)


def with_digests(records: Iterable[Record], folder: Path) -> list[Record]:
    """Return the records with the digests of their images, of which only missing ones are read from the folder."""
    return [record if record.digest else replace(record, digest=_digest(folder / record.image)) for record in records]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_records(folder: Path) -> list[Record]:
    """Return the records of a data folder. Raises `FileNotFoundError` for a folder that was not built."""
    file = folder / DATA
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: build it with python -m training.default_data")
    values = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [Record(**{**value, "tags": tuple(value["tags"])}) for value in values]
