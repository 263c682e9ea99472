"""The interface of the methods by likeness: they are fitted to labelled vectors and return log-probabilities for a query.

Each image has a vector of length one from the frozen vision encoder. Leave-one-out compares methods on the labelled vectors
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.likeness import Vectors
from server.fewshot.methods.paired import Paired

Array = NDArray[np.float64]

# Converts similarity to nats: if a query is more similar to one label than to another by 1 / SCALE, it is e times as likely
# to have it. A blend with the language model's log-likelihood was most accurate on photographs with 32 to 64.
SCALE = 48.0
# maximum number of folds that are left out in turn; each has one example per label if there are enough folds
MAX_FOLDS = 32
# the same for a choice between methods, for which a request waits: it makes all estimates a little lower
CHOICE_FOLDS = 10
# the fold of an example that is never left out
KEPT = -1


@dataclass(frozen=True, slots=True)
class Labelled:
    """Vectors [N, D] of length one, and the index of each one's label, [N]; each of `num_labels` has at least one."""

    vectors: Vectors
    labels: NDArray[np.int64]
    num_labels: int

    def counts(self) -> NDArray[np.int64]:
        """Return the number of examples per label."""
        return np.bincount(self.labels, minlength=self.num_labels)

    def sums(self) -> Array:
        """Return the sum of each label's vectors, [C, D]."""
        by_label = np.argsort(self.labels, kind="stable")
        starts = np.searchsorted(self.labels[by_label], np.arange(self.num_labels))
        return np.add.reduceat(self.vectors[by_label], starts, dtype=np.float64)

    def compact(self) -> Labelled:
        """Return the vectors with at most as many coordinates as there are vectors; their inner products stay the same."""
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

    def parameters(self) -> Mapping[str, Array]:
        """Return the fitted parameters, without the vectors themselves."""


class LikenessMethod(Protocol):
    """A method by likeness."""

    def fit(self, labelled: Labelled) -> Fitted:
        """Fit to labelled vectors. If the result of a fit changes, increment `FORMAT` in `fits.py`."""

    def restore(self, parameters: Mapping[str, Array], labelled: Labelled) -> Fitted:
        """Return what `fit` returned for these vectors, from its parameters."""


def folds(labels: NDArray[np.int64], limit: float = float("inf")) -> NDArray[np.int64]:
    """Return the fold of each example, [N]: the examples of one fold are left out together.

    A fold has one example of each label, so that the remaining examples keep the shares of the labels: if an example were
    left out alone, its label would be rarer than the others, and all methods would seem worse than they are. With a `limit`
    of folds, each may have more examples. The only example of a label has the fold `KEPT`: without it, no method could
    answer with that label.
    """
    counts = np.bincount(labels)
    num_folds = int(min(limit, counts.max()))
    return np.where(counts[labels] == 1, KEPT, occurrences(labels) % num_folds)


def occurrences(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each example how many before it have the same label, [N]."""
    counts, by_label = np.bincount(labels), np.argsort(labels, kind="stable")
    numbers = np.empty_like(labels)
    numbers[by_label] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers


def left_out_log_probabilities(method: LikenessMethod, labelled: Labelled, max_folds: int = MAX_FOLDS) -> Array:
    """Return log-probabilities [N, C] of the labels of each example, fitted to other folds; NaN for one that is kept."""
    logs = np.full((len(labelled.labels), labelled.num_labels), np.nan)
    compact, fold_of = labelled.compact(), folds(labelled.labels, max_folds)
    for fold in np.unique(fold_of[fold_of != KEPT]):
        left_out = fold_of == fold
        logs[left_out] = method.fit(compact.without(left_out)).log_probabilities(compact.vectors[left_out])
    return logs


def best_method(is_correct: Mapping[str, NDArray[np.bool_]], expected: str) -> str:
    """Return the name of the expected method, unless another one is better in leave-one-out by more than chance.

    `is_correct`: for each method, which of the left-out examples [N] it answers correctly.
    """
    best = max(is_correct, key=lambda name: is_correct[name].sum())
    return best if Paired.of(is_correct[best], is_correct[expected]).is_clear else expected


def log_softmax(values: Array) -> Array:
    """Return the logarithms of the softmax over the last axis."""
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
