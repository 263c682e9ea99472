"""A record describes one image of the default model's data: its path, content, source and licence.

`data.jsonl` has one record per line; training and evaluation read the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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


def write_records(folder: Path, records: Iterable[Record]) -> None:
    lines = [json.dumps(asdict(record), ensure_ascii=False) for record in records]
    (folder / DATA).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_records(folder: Path) -> list[Record]:
    """Return the records of a data folder. Raises `FileNotFoundError` for a folder that was not built."""
    file = folder / DATA
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: build it with python -m training.default_data")
    values = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [Record(**{**value, "tags": tuple(value["tags"])}) for value in values]
