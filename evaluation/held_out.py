"""Episodes of images for the methods by likeness, in process: their vectors come from the cached features.

An episode takes milliseconds, so methods and their estimates can be compared on many episodes. Methods with a prompt need a
server: see `evaluation.methods` and `evaluation.leave_one_out`. Reported figures are measured on held-out images. Choices,
such as that of a method, are made on images that `evaluation.default` does not report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from model.likeness import ClassLikeness, Likeness, Vectors, load_likeness
from server.fewshot.methods.likeness import Labelled
from training.default.catalogue import Catalogue, Rows
from training.default.discriminants import NUM_FAMILIAR, compute_discriminants, familiar_directions
from training.default_data.classes import read_classes

# maximum of images of a category that become queries
MAX_QUERIES = 10
# of drawings: the discriminants are fitted to half of the labels, and need the covariance of two
MIN_LABELS = 4
# ways -> the numbers of rounds after which `evaluation.default` asks queries; six rounds of five are 30 shots
ROUNDS = {2: (1, 2, 5), 5: (1, 2, 5, 6)}
LARGEST_EPISODE = max(map(max, ROUNDS.values()))


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """Examples, equally many per label, and queries of the same labels."""

    examples: Labelled
    queries: Labelled


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """Categories of images that were not used in training, with their vectors by row."""

    name: str
    categories: Mapping[str, Sequence[int]]
    vectors: Mapping[int, np.ndarray]

    def episodes(self, ways: int, per_label: int, count: int, seed: str, *, min_queries: int = 1) -> Iterator[Episode]:
        """Yield random episodes; none if too few categories have enough images."""
        enough = per_label + min_queries
        usable = sorted(name for name, rows in self.categories.items() if len(rows) >= enough)
        for number in range(count if len(usable) >= ways else 0):
            rng = Random(f"{seed}/{self.name}/{ways}/{per_label}/{number}")
            drawn = [rng.sample(self.categories[name], len(self.categories[name])) for name in rng.sample(usable, ways)]
            num_queries = min(MAX_QUERIES, min(map(len, drawn)) - per_label)
            yield self._episode([rows[: per_label + num_queries] for rows in drawn], per_label)

    def _episode(self, rows: Sequence[Sequence[int]], per_label: int) -> Episode:
        """Return the first images of each label as examples and the others as queries, all labels in turn."""
        turns = [(row, label) for turn in zip(*rows, strict=True) for label, row in enumerate(turn)]
        vectors: Vectors = np.stack([self.vectors[row] for row, _ in turns])
        # a linear head is fitted much faster in fewer coordinates
        images = Labelled(vectors, np.array([label for _, label in turns]), len(rows)).compact()
        is_query = np.arange(len(turns)) >= per_label * len(rows)
        return Episode(images.without(is_query), images.without(~is_query))


def load_domains(data: Path, model: Path) -> list[Domain]:
    """Return drawings by label, photographs by category, and drawings of different labels by category: all held out."""
    catalogue = Catalogue(data)
    categories = {
        "drawings": catalogue.held_out_labels,
        "photographs": catalogue.photographs,
        "kinds of drawings": catalogue.held_out_kinds,
    }
    return with_vectors(categories, catalogue, load_likeness(model))


def with_vectors(categories: Mapping[str, Rows], catalogue: Catalogue, likeness: Likeness) -> list[Domain]:
    """Return a domain for each name, with the vectors of its images."""

    def domain(name: str) -> Domain:
        rows = sorted({row for members in categories[name].values() for row in members})
        vectors = likeness(np.stack([catalogue.pooled(row).numpy() for row in rows]))
        return Domain(name, categories[name], dict(zip(rows, vectors, strict=True)))

    return [domain(name) for name in categories if categories[name]]


@dataclass(frozen=True, slots=True, eq=False)
class Unreported:
    """Categories that `evaluation.default` does not report, by domain, and a likeness that was not fitted to them.

    Photographs come from the categories that are too small for its episodes. Drawings come from every second training
    label, and the discriminants are fitted again, to the remaining labels. A kind has one drawing of each such label.
    """

    catalogue: Catalogue
    categories: Mapping[str, Rows]
    likeness: Likeness

    @classmethod
    def load(cls, data: Path, model: Path) -> Unreported:
        catalogue, likeness = Catalogue(data), load_likeness(model)
        names = sorted(catalogue.labels)
        if len(names) < MIN_LABELS:
            raise SystemExit(f"error: {data} has {len(names)} labels of drawings to train on, {MIN_LABELS} are needed")
        fitted, classified = ({name: catalogue.labels[name] for name in names[half::2]} for half in (0, 1))
        if isinstance(likeness, ClassLikeness):
            likeness = _fit_to(likeness, catalogue, fitted, read_classes(data))
        photographs = {name: rows for name, rows in catalogue.photographs.items() if len(rows) <= LARGEST_EPISODE}
        categories = {
            "photographs": photographs,
            "drawings": classified,
            "kinds of drawings": _kinds(catalogue, classified),
        }
        return cls(catalogue, categories, likeness)

    def domains(self) -> list[Domain]:
        return with_vectors(self.categories, self.catalogue, self.likeness)


def _fit_to(likeness: ClassLikeness, catalogue: Catalogue, labels: Rows, classes: Tensor) -> ClassLikeness:
    """Return the likeness with the parts that depend on drawings fitted to these labels."""
    images = [torch.stack([catalogue.pooled(row) for row in rows]) for rows in labels.values()]
    fitted = compute_discriminants(images, classes, len(likeness.directions))
    familiar = familiar_directions(torch.cat(images), fitted.mean, NUM_FAMILIAR)
    return replace(likeness, mean=fitted.mean.numpy(), directions=fitted.directions.numpy(), familiar=familiar.numpy())


def _kinds(catalogue: Catalogue, labels: Rows) -> Rows:
    """Return one drawing of each of these labels, by its category."""
    kinds: Rows = {}
    for rows in labels.values():
        if kind := catalogue.records[rows[0]].category:
            kinds.setdefault(kind, []).append(rows[0])
    return kinds
