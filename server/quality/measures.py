"""Measures of a set of predictions: accuracy with its interval, confusion, calibration error, Brier score, likelihood.

A prediction is a vector of probabilities over the labels, and its true label is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.fewshot.methods.likeness import Array
from server.schemas.responses.evaluations import Bin

# two-sided 95% of the normal distribution
Z = 1.959963984540054
NUM_BINS = 10
# the cost in nats of a true label with probability 0, instead of infinity
MAX_SURPRISE = 100.0


def wilson(num_correct: float, total: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a proportion; `num_correct` may be a mean over repetitions of the same queries."""
    share, square = num_correct / total, Z * Z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = Z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    # rounding must not exclude the proportion from its interval
    low, high = min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
    return low if share else 0.0, high


def standard_error(num_correct: float, total: int) -> float:
    """Return the standard error of a proportion, from its interval: never zero, even if all are correct."""
    low, high = wilson(num_correct, total)
    return (high - low) / (2 * Z)


@dataclass(frozen=True, slots=True)
class Predictions:
    """Probabilities [Q, C] of Q queries over C labels, and the index of the true label of each. Q is at least 1."""

    probabilities: Array
    truth: NDArray[np.int64]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The index of the most likely label of each query: [Q]."""
        return self.probabilities.argmax(1)

    @property
    def is_correct(self) -> NDArray[np.bool_]:
        """True for each query whose most likely label is the true one: [Q]."""
        return self.labels == self.truth

    @property
    def confidence(self) -> Array:
        """The highest probability of each query: [Q]."""
        return self.probabilities.max(1)

    def confusion(self, labels: Sequence[str]) -> dict[str, dict[str, int]]:
        """Return the number of queries by true and predicted label, without zeros."""
        table: dict[str, dict[str, int]] = {}
        for (truth, predicted), count in Counter(zip(self.truth.tolist(), self.labels.tolist(), strict=True)).items():
            table.setdefault(labels[truth], {})[labels[predicted]] = count
        return table

    def brier(self) -> float:
        """Return the mean squared distance to the true label, 0 to 2."""
        truth = np.eye(self.probabilities.shape[1])[self.truth]
        return float(((self.probabilities - truth) ** 2).sum(1).mean())

    def nll(self) -> float:
        """Return the mean negative log-probability of the true label, in nats."""
        probability = self.probabilities[np.arange(len(self.truth)), self.truth]
        return float(-np.log(np.maximum(probability, math.exp(-MAX_SURPRISE))).mean())

    def bins(self) -> list[Bin]:
        """Return bins of equal width over the confidence."""
        indices = np.minimum((self.confidence * NUM_BINS).astype(int), NUM_BINS - 1)
        return [self._bin(indices == index, index / NUM_BINS, (index + 1) / NUM_BINS) for index in range(NUM_BINS)]

    def calibration_error(self) -> float:
        """Return the expected calibration error: the distance of confidence and accuracy, averaged over queries."""
        gaps = (b.count * abs((b.confidence or 0.0) - (b.accuracy or 0.0)) for b in self.bins())
        return math.fsum(gaps) / len(self.truth)

    def summary(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return all measures by the names that the API gives them."""
        num_correct, total = int(self.is_correct.sum()), len(self.truth)
        return {
            "queries": total,
            "correct": num_correct,
            "accuracy": num_correct / total,
            "accuracy_interval": list(wilson(num_correct, total)),
            "confusion": self.confusion(labels),
            "expected_calibration_error": self.calibration_error(),
            "bins": [asdict(b) for b in self.bins()],
            "brier": self.brier(),
            "nll": self.nll(),
        }

    def _bin(self, is_inside: NDArray[np.bool_], low: float, high: float) -> Bin:
        count = int(is_inside.sum())
        if not count:
            return Bin(low, high, 0, None, None)
        confidence, accuracy = self.confidence[is_inside].mean(), self.is_correct[is_inside].mean()
        return Bin(low, high, count, float(confidence), float(accuracy))
