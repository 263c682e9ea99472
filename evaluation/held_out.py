"""Episodes of held-out images for the methods by likeness, in process: their vectors come from the cached features.

An episode takes milliseconds, so methods and their estimates can be compared closely. Methods with a prompt need a server:
see `evaluation.methods` and `evaluation.leave_one_out`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from model.likeness import load_likeness
from server.fewshot.methods.likeness import Labelled, Vectors
from training.default.catalogue import Catalogue, Rows

# the most images of a category that are not examples and become queries
MAX_QUERIES = 10


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """Examples, as many of each label, and queries of the same labels."""

    examples: Labelled
    queries: Labelled


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """Categories of images that nothing was trained on, with their vectors by row."""

    name: str
    categories: Mapping[str, Sequence[int]]
    vectors: Mapping[int, np.ndarray]

    def half(self, number: int) -> Domain:
        """Return every other category, from the first (0) or the second (1) on."""
        names = sorted(self.categories)[number::2]
        return Domain(self.name, {name: self.categories[name] for name in names}, self.vectors)

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
    """Return drawings by label, photographs by category, and drawings of different labels by category."""
    catalogue, likeness = Catalogue(data), load_likeness(model)

    def domain(name: str, categories: Rows) -> Domain:
        rows = sorted({row for members in categories.values() for row in members})
        vectors = likeness(np.stack([catalogue.pooled(row).numpy() for row in rows]))
        return Domain(name, categories, dict(zip(rows, vectors, strict=True)))

    return [
        domain("drawings", catalogue.held_out_labels),
        domain("photographs", catalogue.photographs),
        domain("kinds of drawings", catalogue.held_out_kinds),
    ]
