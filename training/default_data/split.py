"""Decides, for both training and evaluation, whether a category is held out and must not be used in training.

The decision depends only on the category's name: a fifth of all names is held out, whatever their source. Some packages
have one image under several names, so training also leaves out copies of the images that are held out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from training.default_data.records import Record

NUM_PARTS = 5  # one of which is held out
# shorter names occur inside other words
MIN_LETTERS = 4


def is_held_out(category: str) -> bool:
    """Return whether a label or category of this name is held out for evaluation."""
    return hashlib.sha256(category.strip().lower().encode()).digest()[0] % NUM_PARTS == 0


def is_held_out_image(path: str) -> bool:
    """Return whether the image is held out for the evaluation of naming: one in twelve of each known category."""
    return hashlib.sha256(path.encode()).digest()[1] % 12 == 0


def has_held_out_name(record: Record) -> bool:
    """Return whether the record's label or category is held out."""
    return any(is_held_out(name) for name in (record.label, record.category) if name)


def training_rows(records: Sequence[Record]) -> list[int]:
    """Return the rows that may be used in training.

    Excluded are all rows that are not `named_for_training`, and those whose image has the same bytes as one of them.
    """
    rows = named_for_training(records)
    excluded = {records[row].digest for row in set(range(len(records))) - set(rows)}
    return [row for row in rows if records[row].digest not in excluded]


def named_for_training(records: Sequence[Record]) -> list[int]:
    """Return the rows that may be used in training by their names.

    Excluded are images with a held-out label or category, images held out for naming, images of evaluation sources, and
    unlabelled images whose file name contains a held-out label.
    """
    names = {_letters(record.label) for record in records if record.label and is_held_out(record.label)}
    held_out_names = [name for name in names if len(name) >= MIN_LETTERS]
    return [
        row
        for row, record in enumerate(records)
        if _is_training_record(record) and not _contains_name(record, held_out_names)
    ]


def _is_training_record(record: Record) -> bool:
    return record.trains and not has_held_out_name(record) and not is_held_out_image(record.image)


def _contains_name(record: Record, names: Sequence[str]) -> bool:
    stem = _letters(PurePosixPath(record.image).stem)
    return not record.label and any(name in stem for name in names)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())
