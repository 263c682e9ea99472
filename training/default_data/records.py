"""One image of the default model's data: where it lies, what it shows, and what may be done with it.

A line of `data.jsonl` each; the evaluation and the training read the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

DATA = "data.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    image: str  # path below the data folder
    label: str  # what it shows; "" where only the category is known
    category: str  # the kind of thing: "animal mammal", "food fruit"
    tags: tuple[str, ...]
    source: str
    licence: str
    style: str
    domain: Literal["drawing", "photograph"]
    trains: bool


def write_records(folder: Path, records: Iterable[Record]) -> None:
    lines = [json.dumps(asdict(record), ensure_ascii=False) for record in records]
    (folder / DATA).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_records(folder: Path) -> list[Record]:
    lines = (folder / DATA).read_text(encoding="utf-8").splitlines()
    values = map(json.loads, lines)
    return [Record(**{**value, "tags": tuple(value["tags"])}) for value in values]
