"""What training must never see: one function says whether a category is held out, in training and evaluation alike.

A category is held out by its name alone: a fifth of all names, whatever the source that carries them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from training.default_data.records import Record

FIFTHS = 5
# shorter names are found inside other words
LEAST_LETTERS = 4


def held_out(category: str) -> bool:
    """Whether the category of this name belongs to the evaluation."""
    return hashlib.sha256(category.strip().lower().encode()).digest()[0] % FIFTHS == 0


def held_out_image(path: str) -> bool:
    """One image in twelve of a known category is kept for the evaluation of naming."""
    return hashlib.sha256(path.encode()).digest()[1] % 12 == 0


def training_rows(records: Sequence[Record]) -> list[int]:
    """Never an image of a held-out category, nor one kept for naming, nor one of a source for evaluation; and none
    without a label whose file's name holds a held-out one."""
    names = {_letters(record.label) for record in records if record.label and held_out(record.label)}
    hidden = [name for name in names if len(name) >= LEAST_LETTERS]
    return [row for row, record in enumerate(records) if _trains(record) and not _hides(record, hidden)]


def _trains(record: Record) -> bool:
    named = not (record.label and held_out(record.label)) and not held_out(record.category)
    return record.trains and named and not held_out_image(record.image)


def _hides(record: Record, names: Sequence[str]) -> bool:
    stem = _letters(PurePosixPath(record.image).stem)
    return not record.label and any(name in stem for name in names)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())
