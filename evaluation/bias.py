"""Compares estimates for support sets with their accuracy on fresh images: the bias, and the coverage of the intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from evaluation.intervals import Share


@dataclass(frozen=True, slots=True)
class Comparison:
    """The estimate of one setting on one support set with its interval, and the accuracy on fresh images."""

    name: str
    k: int | None
    estimate: Share
    interval: tuple[float, float]
    truth: Share

    @property
    def error(self) -> float:
        return self.estimate.value - self.truth.value

    @property
    def is_covered(self) -> bool:
        """True if the interval contains the accuracy on fresh images, within the counting error of that accuracy itself.

        Both errors are independent, so their squares add up.
        """
        (low, high), (lowest, highest), truth = self.interval, self.truth.interval(), self.truth.value
        is_too_low = self.error < 0
        half = high - self.estimate.value if is_too_low else self.estimate.value - low
        of_truth = truth - lowest if is_too_low else highest - truth
        return abs(self.error) <= math.hypot(half, of_truth)


def summarise(rows: Sequence[Comparison]) -> dict[str, Any]:
    """Summarise one setting over all sets.

    `bias` is the mean of estimate minus truth, with its standard error; `spread` is the standard deviation of that
    difference over sets, and `spread_of_counting` the part that finite counts alone would cause. `covered` is the share of
    intervals that contain the truth.
    """
    errors = [row.error for row in rows]
    spread = stdev(errors) if len(errors) > 1 else 0.0
    counting = fmean(_variance(row.estimate) + _variance(row.truth) for row in rows) ** 0.5
    truth = Share(sum(row.truth.num_correct for row in rows), sum(row.truth.num_answers for row in rows))
    low, high = truth.interval()
    return {
        "sets": len(rows),
        "estimate": fmean(row.estimate.value for row in rows),
        "truth": truth.value,
        "truth_interval": [low, high],
        "bias": fmean(errors),
        "bias_error": spread / len(errors) ** 0.5,
        "spread": spread,
        "spread_of_counting": counting,
        "covered": fmean(row.is_covered for row in rows),
    }


def _variance(share: Share) -> float:
    # one correct and one wrong answer are added, so that a share of zero or one has some variance
    value = (share.num_correct + 1) / (share.num_answers + 2)
    return value * (1 - value) / share.num_answers


def format_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| setting | sets | estimate | fresh images | bias | spread (by counting) | intervals that are right |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in summaries.items():
        low, high = row["truth_interval"]
        lines.append(
            f"| {name} | {row['sets']} | {row['estimate']:.3f} | {row['truth']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {row['bias']:+.3f} ± {row['bias_error']:.3f} | {row['spread']:.3f} ({row['spread_of_counting']:.3f}) "
            f"| {row['covered']:.2f} |"
        )
    return "\n".join(lines)
