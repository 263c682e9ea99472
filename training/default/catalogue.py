"""The default model's images as training and evaluation draw from them: by what they show, with their cached features.

Which image belongs to which side is decided in `default_data.split`, and asked here for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from training.default_data.features import open_features
from training.default_data.records import Record, read_records
from training.default_data.split import held_out, held_out_image, training_rows

Rows = dict[str, list[int]]


class Catalogue:
    def __init__(self, folder: Path) -> None:
        self.records = read_records(folder)
        self._features = open_features(folder, self.records)
        self._pooled: dict[int, Tensor] = {}

    def rows(self, wanted: Callable[[Record], bool], name: Callable[[Record], str], least: int) -> Rows:
        """Rows of the wanted records by a name of theirs, where it has at least so many."""
        return self._named([row for row, record in enumerate(self.records) if wanted(record)], name, least)

    def _named(self, rows: Sequence[int], name: Callable[[Record], str], least: int) -> Rows:
        found: Rows = {}
        for row in rows:
            if key := name(self.records[row]):
                found.setdefault(key, []).append(row)
        return {key: members for key, members in found.items() if len(members) >= least}

    @cached_property
    def training(self) -> list[int]:
        return training_rows(self.records)

    @cached_property
    def labels(self) -> Rows:
        return self._named(self.training, lambda record: record.label, 3)

    @cached_property
    def categories(self) -> Rows:
        return self._named(self.training, lambda record: record.category, 6)

    @cached_property
    def held_out_labels(self) -> Rows:
        return self.rows(lambda r: r.trains and held_out(r.label), lambda record: record.label, 2)

    @cached_property
    def held_out_kinds(self) -> Rows:
        """One image of each thing of a held-out kind: what its images share is the kind alone."""
        rows = self.rows(lambda r: r.trains and held_out(r.category), lambda record: record.category, 2)
        things = {kind: {self.records[row].label: row for row in members} for kind, members in rows.items()}
        return {kind: sorted(of.values()) for kind, of in things.items() if len(of) >= 2}

    @cached_property
    def photographs(self) -> Rows:
        return self.rows(lambda r: r.domain == "photograph", lambda record: record.category, 2)

    @cached_property
    def unseen_images(self) -> Rows:
        """Images never trained on, of labels that are."""
        kept = self.rows(
            lambda r: r.trains and held_out_image(r.image) and not held_out(r.label) and not held_out(r.category),
            lambda record: record.label,
            1,
        )
        return {label: rows for label, rows in kept.items() if label in self.labels}

    def features(self, row: int) -> Tensor:  # -> [F, P, Dv], one frame
        return torch.from_numpy(self._features[row].copy())[None]

    def pooled(self, row: int) -> Tensor:  # -> [Dv]
        if row not in self._pooled:
            self._pooled[row] = self.features(row).float().mean(dim=(0, 1))
        return self._pooled[row]


def digest(row: int) -> bytes:
    return row.to_bytes(8, "big")


def row_of(media: bytes) -> int:
    return int.from_bytes(media, "big")
