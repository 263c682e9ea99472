"""Values of runs with several seeds, such as differences from a base, with the interval of their mean and its sign.

The interval is Student's, of the mean over the seeds. It covers everything that differs between seeds: the initialisation
of the bridge, the order of the data, and the queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from scipy.stats import t as student

CONFIDENCE = 0.95
Verdict = Literal["same", "other", "undecided"]


@dataclass(frozen=True, slots=True)
class SeedValues:
    """One value per seed; with fewer than two values there is no interval. All possible values are between `bounds`."""

    values: tuple[float, ...]
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def interval(self) -> tuple[float, float]:
        if len(self.values) < 2:
            return -math.inf, math.inf
        quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(self.values) - 1))
        half = quantile * stdev(self.values) / math.sqrt(len(self.values))
        return max(self.bounds[0], self.mean - half), min(self.bounds[1], self.mean + half)

    def text(self, digits: int = 1, sign: str = "+") -> str:
        """Return the mean with its interval as text; `sign` is the sign option of the number format."""
        low, high = self.interval()
        if len(set(self.values)) == 1:
            return f"{self.mean:{sign}.{digits}f} [{'one seed' if len(self.values) == 1 else 'all seeds equal'}]"
        return f"{self.mean:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"

    def sign(self) -> int:
        """Return 1 or -1 if the whole interval has this sign, else 0."""
        low, high = self.interval()
        return int(low > 0) - int(high < 0)

    def compare(self, expected: float) -> Verdict:
        """Return whether the sign is that of `expected`; undecided if the interval contains zero."""
        if not self.sign():
            return "undecided"
        return "same" if (self.sign() > 0) == (expected > 0) else "other"


def differences(values: Sequence[float], base: Sequence[float]) -> SeedValues:
    """Return the differences from the base of the same seed."""
    return SeedValues(tuple(value - other for value, other in zip(values, base, strict=True)))
