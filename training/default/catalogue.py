"""The catalogue groups the default model's images by label and category, with their cached features.

Training and evaluation both draw from it; `default_data.split` decides which images belong to which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from training.default_data.features import open_features
from training.default_data.records import Record, read_records, with_digests
from training.default_data.split import (
    has_held_out_name,
    is_held_out,
    is_held_out_image,
    named_for_training,
    training_rows,
)

Rows = dict[str, list[int]]
MIN_IMAGES = 3  # of a label that is trained on


class Catalogue:
    def __init__(self, folder: Path) -> None:
        self.records = with_digests(read_records(folder), folder)
        self._features = open_features(folder, self.records)
        self._pooled: dict[int, Tensor] = {}

    def rows(self, predicate: Callable[[Record], bool], name: Callable[[Record], str], min_rows: int) -> Rows:
        """Return the rows of the records that satisfy `predicate`, by name, for names with at least `min_rows` rows."""
        return self._group([row for row, record in enumerate(self.records) if predicate(record)], name, min_rows)

    def _group(self, rows: Sequence[int], name: Callable[[Record], str], min_rows: int) -> Rows:
        groups: Rows = {}
        for row in rows:
            if key := name(self.records[row]):
                groups.setdefault(key, []).append(row)
        return {key: members for key, members in groups.items() if len(members) >= min_rows}

    @cached_property
    def training(self) -> list[int]:
        return training_rows(self.records)

    @cached_property
    def labels(self) -> Rows:
        return self._group(self.training, lambda record: record.label, MIN_IMAGES)

    @property
    def class_images(self) -> Rows:
        """Return artificial images of the encoder's classes, which only `CatalogueWithClasses` has."""
        return {}

    @property
    def named(self) -> Rows:
        """Return all rows that may be trained on by their name."""
        return self.labels | self.class_images

    @cached_property
    def categories(self) -> Rows:
        return self._group(self.training, lambda record: record.category, 6)

    @cached_property
    def held_out_labels(self) -> Rows:
        return self.rows(lambda r: r.trains and is_held_out(r.label), lambda record: record.label, 2)

    @cached_property
    def held_out_kinds(self) -> Rows:
        """Return one image per label of each held-out category, so that its images share the category alone."""
        rows = self.rows(lambda r: r.trains and is_held_out(r.category), lambda record: record.category, 2)
        by_label = {kind: {self.records[row].label: row for row in members} for kind, members in rows.items()}
        return {kind: sorted(labels.values()) for kind, labels in by_label.items() if len(labels) >= 2}

    @cached_property
    def photographs(self) -> Rows:
        return self.rows(lambda r: r.domain == "photograph", lambda record: record.category, 2)

    @cached_property
    def unseen_images(self) -> Rows:
        """Return held-out images of known labels, whether training leaves out copies of a label's images or not."""
        known = self._group(named_for_training(self.records), lambda record: record.label, MIN_IMAGES)
        held_out_rows = self.rows(
            lambda r: r.trains and is_held_out_image(r.image) and not has_held_out_name(r),
            lambda record: record.label,
            1,
        )
        return {label: rows for label, rows in held_out_rows.items() if label in known}

    def features(self, row: int) -> Tensor:  # -> [F, P, Dv], one frame
        return torch.from_numpy(self._features[row].copy())[None]

    def pooled(self, row: int) -> Tensor:  # -> [Dv]
        if row not in self._pooled:
            self._pooled[row] = self.features(row).float().mean(dim=(0, 1))
        return self._pooled[row]


def row_digest(row: int) -> bytes:
    """Return the digest under which examples refer to the image of a row."""
    return row.to_bytes(8, "big")


def row_of(media_digest: bytes) -> int:
    return int.from_bytes(media_digest, "big")
