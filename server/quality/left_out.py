"""Exact leave-one-out by the nearest mean, and confidence in labels.

The mean of a label without an example follows from the sum of the label's vectors, so nothing is fitted anew. Similarities
are computed for a block of examples at a time, so that memory does not grow with the square of the number of examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.likeness import Vectors
from server.fewshot.methods.likeness import SCALE as CLASSIFICATION_SCALE
from server.fewshot.methods.likeness import Array, Labelled

# Similarity in nats. With that of a classification, most examples are certain of a label, and confidence says less: on
# photographs with a tenth of wrong labels, 54% of the named examples had one, instead of 59%.
SCALE = CLASSIFICATION_SCALE / 2
# numbers in a block
BLOCK = 2**20
TINY = 1e-100
# probabilities that differ by less are equal: similarities are computed in single precision
ROUNDING = 1e-4

Indices = NDArray[np.int64]


def blocks(number: int, width: int) -> Iterator[slice]:
    """Yield the rows of a matrix [number, width] in blocks of a limited size."""
    size = max(BLOCK // max(width, 1), 1)
    for start in range(0, number, size):
        yield slice(start, min(start + size, number))


@dataclass(frozen=True, slots=True, eq=False)
class LabelSums:
    """Labelled vectors, and the sum of each label's vectors."""

    labelled: Labelled
    counts: Indices  # [C]
    sums: Vectors  # [C, D]
    squares: Array  # [C], of the lengths of the sums
    lengths: Array  # [N], the squares of those of the vectors: 1, or 0 for a vector of zeros

    @property
    def has_others(self) -> NDArray[np.bool_]:
        """True for each example whose label has other examples: [N]."""
        return self.counts[self.labelled.labels] > 1

    def scores(self, rows: slice) -> Array:
        """Return the similarities [R, C] in nats of examples to the labels' means, each without the example itself.

        The label of its only example has minus infinity.
        """
        labels = self.labelled.labels[rows]
        itself = (np.arange(len(labels)), labels)
        dots = (self.labelled.vectors[rows] @ self.sums.T).astype(np.float64)
        squares = np.repeat(self.squares[None], len(labels), axis=0)
        squares[itself] += self.lengths[rows] - 2 * dots[itself]
        dots[itself] -= self.lengths[rows]
        scores = similarity(dots, squares)
        scores[itself] = np.where(self.has_others[rows], scores[itself], -np.inf)
        return scores


def label_sums(labelled: Labelled) -> LabelSums:
    sums = labelled.sums()
    lengths = np.einsum("nd,nd->n", labelled.vectors, labelled.vectors, dtype=np.float64)
    squares = np.einsum("cd,cd->c", sums, sums)
    return LabelSums(labelled, labelled.counts(), sums.astype(np.float32), squares, lengths)


def similarity(dots: Array, squares: Array) -> Array:
    """Return the similarity in nats to a mean, from the inner product with a sum and the square of the sum's length."""
    return SCALE * np.clip(dots / np.sqrt(np.maximum(squares, TINY)), -1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class LeftOutScores:
    """The scores of each example in nats, from the other examples: [N] each.

    `truth` is that of its label, `best` that of the best other label, `other`, and `total` the log-sum-exp of all.
    """

    truth: Array
    total: Array
    other: Indices
    best: Array

    @property
    def is_right(self) -> NDArray[np.bool_]:
        return self.truth > self.best


def leave_each_out(sums: LabelSums) -> LeftOutScores:
    """Score each example with the others."""
    number = len(sums.labelled.labels)
    truth, total, best = (np.empty(number) for _ in range(3))
    other = np.empty(number, np.int64)
    for rows in blocks(number, sums.labelled.num_labels):
        scores, labels = sums.scores(rows), sums.labelled.labels[rows]
        index = np.arange(len(labels))
        truth[rows] = scores[index, labels]
        total[rows] = np.maximum(np.logaddexp.reduce(scores, axis=1), -SCALE)
        scores[index, labels] = -np.inf
        other[rows] = scores.argmax(1)
        best[rows] = scores[index, other[rows]]
    return LeftOutScores(truth, total, other, best)


def confident_labels(sums: LabelSums, left_out: LeftOutScores) -> tuple[Indices, Array]:
    """Return the label [N] that each example has with confidence, and by how much it is more probable than its own, [N].

    Confident learning (Northcutt, Jiang and Chuang, 2021): an example has a label with confidence if the label is as
    probable as it is for its own examples on average. Of several such labels, the example has the most probable one.
    """
    confident, margins = sums.labelled.labels.copy(), np.zeros(len(sums.labelled.labels))
    thresholds = self_confidence(sums, left_out)
    for rows in blocks(len(confident), sums.labelled.num_labels):
        probabilities = np.exp(sums.scores(rows) - left_out.total[rows, None])
        index, labels = np.arange(len(probabilities)), sums.labelled.labels[rows]
        candidate = np.where(probabilities >= thresholds, probabilities, 0).argmax(1)
        margin = probabilities[index, candidate] - probabilities[index, labels]
        is_confident = probabilities[index, candidate] >= thresholds[candidate]
        is_other = sums.has_others[rows] & is_confident & (margin > ROUNDING)
        confident[rows] = np.where(is_other, candidate, labels)
        margins[rows] = np.where(is_other, margin, 0)
    return confident, margins


def self_confidence(sums: LabelSums, left_out: LeftOutScores) -> Array:
    """Return the mean probability [C] of each label for its examples; a label with one example has the mean of all."""
    probabilities, has_others = np.exp(left_out.truth - left_out.total), sums.has_others
    if not has_others.any():
        return np.ones(sums.labelled.num_labels)
    totals = np.bincount(sums.labelled.labels, np.where(has_others, probabilities, 0), sums.labelled.num_labels)
    return np.where(sums.counts > 1, totals / sums.counts, probabilities[has_others].mean())
