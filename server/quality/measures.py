"""What a set of judged answers says: accuracy with its interval, confusion, calibration error, Brier score, likelihood.

Each answer is a vector of probabilities over the same labels, and the label that is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# two-sided 95% of the normal distribution
Z = 1.959963984540054
NUM_BINS = 10
# a right answer that was called impossible costs this many nats, not infinitely many
MAX_SURPRISE = 100.0


def wilson(right: float, total: int) -> tuple[float, float]:
    """The 95% interval of a share. `right` may be a mean over repetitions on the same `total` queries."""
    share, square = right / total, Z * Z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = Z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def standard_error(right: float, total: int) -> float:
    """Of a share, from its interval: never zero, also where every answer was right."""
    low, high = wilson(right, total)
    return (high - low) / (2 * Z)


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers whose confidence lies in [low, high) (the last bin: high included)."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Judged:
    """Probabilities [Q, C] of Q answers over C labels, and the right label's place for each. Q is at least 1."""

    probabilities: Array
    truth: NDArray[np.int64]

    @property
    def predicted(self) -> NDArray[np.int64]:
        places: NDArray[np.int64] = self.probabilities.argmax(1)
        return places

    @property
    def is_right(self) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.predicted == self.truth
        return right

    @property
    def confidence(self) -> Array:
        highest: Array = self.probabilities.max(1)
        return highest

    def confusion(self, labels: Sequence[str]) -> dict[str, dict[str, int]]:
        """Right label -> answered label -> how often; what never happened is left out."""
        table: dict[str, dict[str, int]] = {}
        for right, answered in zip(self.truth.tolist(), self.predicted.tolist(), strict=True):
            row = table.setdefault(labels[right], {})
            row[labels[answered]] = row.get(labels[answered], 0) + 1
        return table

    def brier(self) -> float:
        """Mean squared distance to the right answer, 0 to 2."""
        return float(((self.probabilities - self._targets()) ** 2).sum(1).mean())

    def nll(self) -> float:
        """Mean negative log-probability of the right answer, in nats."""
        right = self.probabilities[np.arange(len(self.truth)), self.truth]
        return float(-np.log(np.maximum(right, math.exp(-MAX_SURPRISE))).mean())

    def bins(self, count: int = NUM_BINS) -> list[Bin]:
        """Equal widths over the confidence."""
        places = np.minimum((self.confidence * count).astype(int), count - 1)
        return [self._bin(places == place, place / count, (place + 1) / count) for place in range(count)]

    def calibration_error(self, count: int = NUM_BINS) -> float:
        """Expected calibration error: how far confidence is from accuracy, bin by bin, weighted by the answers in it."""
        found = [one for one in self.bins(count) if one.count]
        gaps = (one.count * abs((one.confidence or 0.0) - (one.accuracy or 0.0)) for one in found)
        return math.fsum(gaps) / len(self.truth)

    def summary(self, labels: Sequence[str]) -> dict[str, Any]:
        right, total = int(self.is_right.sum()), len(self.truth)
        low, high = wilson(right, total)
        return {
            "queries": total,
            "correct": right,
            "accuracy": right / total,
            "accuracy_interval": [low, high],
            "confusion": self.confusion(labels),
            "expected_calibration_error": self.calibration_error(),
            "bins": [asdict(one) for one in self.bins()],
            "brier": self.brier(),
            "nll": self.nll(),
        }

    def _targets(self) -> Array:
        eye: Array = np.eye(self.probabilities.shape[1])[self.truth]
        return eye

    def _bin(self, inside: NDArray[np.bool_], low: float, high: float) -> Bin:
        count = int(inside.sum())
        if not count:
            return Bin(low, high, 0, None, None)
        return Bin(low, high, count, float(self.confidence[inside].mean()), float(self.is_right[inside].mean()))
