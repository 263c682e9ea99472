"""Nearest mean and nearest neighbours: compares a query with each label's mean, or with its nearest examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from model.likeness import Vectors
from server.fewshot.methods.likeness import SCALE, Array, Labelled, log_softmax

NUM_NEIGHBOURS = 5


@dataclass(frozen=True, slots=True)
class NearestMean:
    """The similarity of a query to the mean direction of each label's examples."""

    def fit(self, labelled: Labelled) -> Means:
        sums = labelled.sums()
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        return Means(sums / np.maximum(lengths, np.finfo(np.float32).tiny))

    def restore(self, parameters: Mapping[str, Array], labelled: Labelled) -> Means:
        return Means(parameters["means"])


@dataclass(frozen=True, slots=True, eq=False)
class Means:
    """The mean directions of the labels, [C, D]."""

    means: Array

    def log_probabilities(self, queries: Vectors) -> Array:
        return log_softmax(SCALE * (queries @ self.means.T))

    def parameters(self) -> Mapping[str, Array]:
        return {"means": self.means}


@dataclass(frozen=True, slots=True)
class NearestNeighbours:
    """The similarities of a query to the nearest examples of each label, at most `NUM_NEIGHBOURS`.

    Every label is compared by the same number of examples, that of the rarest label: frequent labels have no advantage.
    """

    def fit(self, labelled: Labelled) -> Neighbours:
        return Neighbours(labelled, int(min(NUM_NEIGHBOURS, labelled.counts().min())))

    def restore(self, parameters: Mapping[str, Array], labelled: Labelled) -> Neighbours:
        return Neighbours(labelled, int(parameters["num_neighbours"].item()))


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    labelled: Labelled
    num_neighbours: int

    def log_probabilities(self, queries: Vectors) -> Array:
        similarities = np.asarray(queries @ self.labelled.vectors.T, np.float64)  # [Q, N]
        logs = np.empty((len(queries), self.labelled.num_labels))
        for label in range(self.labelled.num_labels):
            similar = similarities[:, self.labelled.labels == label]
            nearest = np.partition(similar, -self.num_neighbours)[:, -self.num_neighbours :]
            logs[:, label] = SCALE * nearest.mean(1)
        return log_softmax(logs)

    def parameters(self) -> Mapping[str, Array]:
        return {"num_neighbours": np.array([self.num_neighbours], np.float64)}
