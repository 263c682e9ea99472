"""The photographs that were not used to train any part of the default model, by kind, as uploads to a server.

Most categories have few images. A kind joins categories that have more in common with each other than with the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flamboyance_client import Client, Conflict, NotFound
from model.likeness import Vectors, load_likeness, unit
from model.zoo.default import prepare
from training.default.catalogue import Catalogue

Labelled = Sequence[tuple[str, str]]

KINDS: Mapping[str, tuple[str, ...]] = {
    "birds": ("birds",),
    "hoofed animals": ("bovines", "camel", "deer", "equines"),
    "other mammals": ("apes", "bears", "cats", "dogs", "lagomorphs", "mammals", "marsupials", "rodents"),
    "plants": ("flowers", "plants", "trees"),
    "food": ("fruit", "mushrooms", "nuts", "spices", "vegetables"),
    "objects": ("clothes", "construction", "household", "medical", "sports", "tools", "toys"),
}


@dataclass(frozen=True, slots=True)
class Photographs:
    """The ids of the uploads by kind, and the likeness [D] of each, as the server computes it, from the cached features."""

    by_kind: Mapping[str, list[str]]
    vectors: Mapping[str, Vectors]

    def accuracy(self, labelled: Labelled, fresh: Labelled) -> tuple[int, int]:
        """Return how many fresh photographs the nearest mean of labelled ones classifies right, and of how many."""
        kinds = sorted({kind for _, kind in labelled})
        means = [np.sum([self.vectors[image] for image, label in labelled if label == kind], axis=0) for kind in kinds]
        queries = np.stack([self.vectors[image] for image, _ in fresh])
        nearest = (queries @ unit(np.stack(means)).T).argmax(1)
        return sum(kinds[index] == kind for index, (_, kind) in zip(nearest, fresh, strict=True)), len(fresh)


def rows_by_kind(catalogue: Catalogue) -> dict[str, list[int]]:
    """Return the rows of the photographs of each kind."""
    categories = catalogue.rows(lambda record: record.domain == "photograph", lambda record: record.category, 1)
    return {kind: [row for name in names for row in categories[name]] for kind, names in KINDS.items()}


@contextmanager
def uploaded(client: Client, data: Path) -> Iterator[Photographs]:
    """Upload the photographs of a folder of `training.default_data`, and delete them at the end."""
    catalogue, likeness = Catalogue(data), load_likeness(prepare())
    by_kind: dict[str, list[str]] = {}
    vectors: dict[str, Vectors] = {}
    try:
        for kind, rows in rows_by_kind(catalogue).items():
            by_kind[kind] = [client.images.upload(data / catalogue.records[row].image).id for row in rows]
            features = np.stack([catalogue.pooled(row).numpy() for row in rows])
            vectors |= zip(by_kind[kind], likeness(features), strict=True)
        yield Photographs(by_kind, vectors)
    finally:
        for image_id in {image_id for of_kind in by_kind.values() for image_id in of_kind}:
            with suppress(Conflict, NotFound):  # an id depends only on the content, so another client may have it, too
                client.images.delete(image_id)
