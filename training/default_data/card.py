"""The data card lists the default model's data by source, with licences, counts and the held-out part.

The command that builds the data writes the card next to it, so its numbers always match the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from training.default_data.records import Record
from training.default_data.sources import EMOJIBASE, SOURCES, Source
from training.default_data.split import is_held_out, training_rows

CARD = "DATA_CARD.md"

INTRODUCTION = """# The default model's data

Built by `python -m training.default_data` from packages of public registries; the repository contains no training image.
A category is held out if the SHA-256 of its name falls into the first fifth (`training/default_data/split.py`);
its images are never trained on, nor are copies of them, which have the same bytes under another name. A source marked
"evaluation" is never trained on at all.

| source | package | version | licence | attribution | images | used for |
|---|---|---|---|---|---|---|
"""


def write_card(folder: Path, records: Sequence[Record]) -> None:
    counts = Counter(record.source for record in records)
    rows = "".join(_row(source, counts[source.name]) for source in (*SOURCES, EMOJIBASE))
    (folder / CARD).write_text(INTRODUCTION + rows + "\n" + _summary(records), encoding="utf-8")


def _row(source: Source, images: int) -> str:
    purpose = "training" if source.trains else "evaluation"
    package = f"{source.package} ({source.registry})"
    cells = (source.name, package, source.version, source.licence, source.attribution, str(images), purpose)
    return f"| {' | '.join(cells)} |\n"


def _summary(records: Sequence[Record]) -> str:
    labels = {record.label for record in records if record.trains and record.label}
    num_held_out = sum(is_held_out(label) for label in labels)
    num_trained = len(training_rows(records))
    return (
        f"{len(records)} images, {num_trained} of them for training; {len(labels)} named concepts, "
        f"{num_held_out} of them held out.\n"
    )
