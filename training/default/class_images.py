"""Artificial images of the encoder's own classes, which teach names of things that no training image shows.

All features of a training drawing are shifted by one vector to the mean of a class. If images of a class vary like drawings
of a label, that mean is the classifier's weights times the covariance within labels (`training/default/discriminants.py`).
The kin of such an image resembles that of a photograph of the class, so the bridge learns to read the name from it.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from random import Random

import timm.data
import torch
from torch import Tensor

from training.default.catalogue import Catalogue, Rows
from training.default.discriminants import covariance_within
from training.default_data.classes import read_classes
from training.default_data.records import Record
from training.default_data.split import MIN_LETTERS, is_held_out

INFO = Path(timm.data.__file__).parent / "_info"
IMAGES_PER_CLASS = 4
# share of a class's distance from the mean drawing; with a smaller share, the classifier does not find the class
STRENGTH = 34.0
# the share of its own deviation that a drawing keeps
KEPT = 0.6
MAX_FEATURE = 6.0  # of the encoder's last activation, ReLU6


class CatalogueWithClasses(Catalogue):
    """A catalogue in which the rows after those of its records are images of classes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._classes = read_classes(folder)

    @cached_property
    def class_images(self) -> Rows:
        """Return the rows by the name of their class, without names that are held out or are already a label."""
        held_out = held_out_names(self.records)
        rows: Rows = {}
        for index, name in enumerate(class_names()):
            if name not in self.labels and name not in rows and not _is_excluded(name, held_out):
                first = len(self.records) + index * IMAGES_PER_CLASS
                rows[name] = list(range(first, first + IMAGES_PER_CLASS))
        return rows

    def features(self, row: int) -> Tensor:
        if row < len(self.records):
            return super().features(row)
        drawing = Random(f"class/{row}").choice(self.training)
        features = super().features(drawing).float()
        mean, direction = self._means[0], self._means[1][(row - len(self.records)) // IMAGES_PER_CLASS]
        shift = direction + (KEPT - 1) * (self.pooled(drawing) - mean)
        return (features + shift).clamp(0, MAX_FEATURE).half()

    @cached_property
    def _means(self) -> tuple[Tensor, Tensor]:
        """Return the mean drawing [Dv] and the difference of each class from it [C, Dv]."""
        images = [torch.stack([self.pooled(row) for row in rows]) for rows in self.labels.values()]
        within = covariance_within(images).float()
        weights = self._classes.float()
        return torch.cat(images).mean(0), STRENGTH * (weights - weights.mean(0)) @ within


def class_names() -> list[str]:
    """Return each class's first name in WordNet, in the order of the classifier."""
    lines = (INFO / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    names = {synset: lemmas.split(", ")[0] for synset, _, lemmas in (line.partition("\t") for line in lines)}
    return [names[synset] for synset in (INFO / "imagenet_synsets.txt").read_text(encoding="utf-8").split()]


def held_out_names(records: list[Record]) -> set[str]:
    names = {name.lower() for record in records for name in (record.label, record.category) if name}
    return {name for name in names if len(name) >= MIN_LETTERS and is_held_out(name)}


def _is_excluded(name: str, held_out: set[str]) -> bool:
    return is_held_out(name) or any(other in name.lower() for other in held_out)
