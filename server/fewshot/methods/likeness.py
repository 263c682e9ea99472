"""The interface of the methods by likeness: they are fitted to labelled vectors, and give a query log-probabilities.

A vector is an image's, from the frozen vision encoder, and has length one. Leave-one-out compares methods on the labelled
vectors themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Array = NDArray[np.float64]

# Similarity in nats: a query that is nearer to one label than to another by 1 / SCALE is e times as likely to have it.
# A blend with the language model's log-likelihood was most accurate on photographs with 32 to 64.
SCALE = 48.0
# leave-one-out fits a method anew for each example, up to this number; beyond it, for each of as many folds
MAX_FOLDS = 32
# the folds beyond that number for a choice between methods, which a request waits for: the estimates of all are a little
# lower than with more folds
CHOICE_FOLDS = 10


@dataclass(frozen=True, slots=True)
class Labelled:
    """Vectors [N, D] of length one, and the index of each one's label, [N]; each of `num_labels` has at least one."""

    vectors: Vectors
    labels: NDArray[np.int64]
    num_labels: int

    def counts(self) -> NDArray[np.int64]:
        """Return the number of examples per label."""
        return np.bincount(self.labels, minlength=self.num_labels)

    def compact(self) -> Labelled:
        """Return the vectors in as many coordinates as there are vectors, at most: products among them stay the same."""
        number, width = self.vectors.shape
        if number >= width:
            return self
        _, coordinates = np.linalg.qr(self.vectors.T.astype(np.float64))
        return replace(self, vectors=np.ascontiguousarray(coordinates.T, np.float32))

    def without(self, left_out: NDArray[np.bool_]) -> Labelled:
        return Labelled(self.vectors[~left_out], self.labels[~left_out], self.num_labels)


class Fitted(Protocol):
    """A method that is fitted to labelled vectors."""

    def log_probabilities(self, queries: Vectors) -> Array:
        """Return the log-probabilities of the labels: [Q, D] -> [Q, C]."""


class LikenessMethod(Protocol):
    """A method by likeness."""

    def fit(self, labelled: Labelled) -> Fitted:
        """Fit to labelled vectors."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The accuracy of a method on examples that it was not fitted to, and its mean surprise in nats."""

    accuracy: float
    surprise: float


def left_out_log_probabilities(method: LikenessMethod, labelled: Labelled, num_folds: int = MAX_FOLDS) -> Array:
    """Return log-probabilities [N, C] of the labels of each example, from other examples. Each label has at least two.

    Beyond `MAX_FOLDS` examples, `num_folds` folds are left out in turn, with each label spread over the folds.
    """
    number = len(labelled.labels)
    num_folds = number if number <= MAX_FOLDS else num_folds
    by_label = np.argsort(labelled.labels, kind="stable")
    folds = np.empty(number, np.int64)
    folds[by_label] = np.arange(number) % num_folds
    logs = np.empty((number, labelled.num_labels))
    compact = labelled.compact()
    for fold in range(num_folds):
        left_out = folds == fold
        logs[left_out] = method.fit(compact.without(left_out)).log_probabilities(compact.vectors[left_out])
    return logs


def summarise(logs: Array, labels: NDArray[np.int64]) -> LeftOut:
    """Return the accuracy and the surprise of log-probabilities [N, C] of left-out examples."""
    truth = logs[np.arange(len(logs)), labels]
    return LeftOut(float((logs.argmax(1) == labels).mean()), float(-truth.mean()))


def best_method(results: Mapping[str, LeftOut]) -> str:
    """Return the name of the method with the highest accuracy by leave-one-out; of equal ones, the least surprised."""
    return max(results, key=lambda name: (results[name].accuracy, -results[name].surprise))


def log_softmax(values: Array) -> Array:
    """Return the logarithms of the softmax over the last axis."""
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
