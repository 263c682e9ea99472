"""Statistics with 95% intervals, printed as cells of tables: shares of correct answers have Wilson intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

from scipy.stats import t as student

CONFIDENCE = 0.95
Z = 1.959964

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True, slots=True)
class Share:
    num_correct: float  # a fraction, if answers can be right in part
    num_answers: int

    @property
    def value(self) -> float:
        return self.num_correct / self.num_answers

    def interval(self) -> tuple[float, float]:
        n, p = self.num_answers, self.value
        centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


def share(answers: list[bool]) -> Share:
    return Share(sum(answers), len(answers))


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of two sums over units, such as support sets; its 95% interval is over the units."""

    fractions: list[tuple[float, float]]

    @property
    def value(self) -> float:
        return sum(numerator for numerator, _ in self.fractions) / sum(denominator for _, denominator in self.fractions)

    def interval(self) -> tuple[float, float]:
        squares = sum((numerator - self.value * denominator) ** 2 for numerator, denominator in self.fractions)
        half = Z * math.sqrt(squares) / sum(denominator for _, denominator in self.fractions)
        return max(0.0, self.value - half), min(1.0, self.value + half)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


def difference_to_best(answers: Mapping[Name, Sequence[bool]], name: Name) -> str:
    """Return the accuracy of `name` minus that of the best other one, paired by answer, with the 95% interval."""
    best = max((other for other in answers if other != name), key=lambda other: sum(answers[other]))
    differences = [int(first) - int(second) for first, second in zip(answers[name], answers[best], strict=True)]
    # one win and one loss are added, so that no difference at all has some variance
    half = Z * stdev([*differences, 1, -1]) / math.sqrt(len(differences))
    mean = fmean(differences)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] ({best})"


def mean_interval(values: Sequence[float], low: float, high: float) -> tuple[float, float] | None:
    """Return Student's 95% interval of a mean of values between `low` and `high`.

    Return None for fewer than two values, and for equal ones: an interval of no width would say that the mean is known.
    """
    if len(set(values)) < 2:
        return None
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * stdev(values) / math.sqrt(len(values))
    return max(low, fmean(values) - half), min(high, fmean(values) + half)


def area_interval(area: float, num_positive: int, num_negative: int) -> tuple[float, float] | None:
    """Return the 95% interval of the area under a ROC curve (Hanley and McNeil 1982); None if its variance is 0."""
    positive, negative = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
    variance = area * (1 - area) + (num_positive - 1) * positive + (num_negative - 1) * negative
    if variance <= 0:
        return None
    half = Z * math.sqrt(variance / (num_positive * num_negative))
    return max(0.0, area - half), min(1.0, area + half)
