"""Confidence in a classification: calibrated probabilities, and the threshold below which no label is returned.

Both are fitted to left-out examples, whose labels are known. A temperature divides the log-probabilities of all candidates,
so it changes only the confidence of an answer (Guo et al. 2017, "On Calibration of Modern Neural Networks"). The threshold
is then chosen by the share of left-out examples whose confidence exceeds it, and by the accuracy on these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.fewshot.methods import BLEND, IN_CONTEXT
from server.fewshot.methods.likeness import Array, log_softmax
from server.schemas.responses.evaluations import CurvePoint

# The temperatures with the lowest negative log-likelihood on new queries of many small sets, fitted by `python -m
# evaluation.temperature`. The blend's comes from few images, for which it was 1.3 times that of the nearest mean. The
# language model's probabilities are not changed until an evaluation has measured them.
DEFAULT_TEMPERATURES: Mapping[str, float] = {
    "nearest_mean": 2.5,
    "knn": 2.1,
    "linear": 0.37,
    BLEND: 3.3,
    IN_CONTEXT: 1.0,
}
# how much sets differ from the default: the standard deviation of the logarithm of their own temperatures
SPREAD = 0.35
# the temperatures that are tried, as multiples of the default
MULTIPLES = np.geomspace(1 / 16, 16, 65)
# maximum left-out examples to which a temperature is fitted: a single number needs no more
MAX_FITTED = 512
# maximum points of a curve in a response, and of one from which a threshold is chosen
SHOWN_POINTS = 20
MAX_POINTS = 200

# a label is returned only above the threshold: with these two, always and never
ALWAYS, NEVER = 0.0, 1.0


@dataclass(frozen=True, slots=True)
class Confidence:
    """A temperature, and the curve of left-out examples at this temperature: empty if none could be left out."""

    temperature: float
    curve: tuple[CurvePoint, ...] = ()
    num_left_out: int = 0

    def threshold(self, name: str, target: float) -> float:
        """Return the threshold of `target_accuracy` or `target_coverage`; the curve is not empty."""
        if name == "target_accuracy":
            return threshold_of_accuracy(self.curve, target)
        return threshold_of_coverage(self.curve, target, self.num_left_out)


def fit_confidence(method: str, logs: Array, truth: NDArray[np.int64]) -> Confidence:
    """Fit to left-out log-probabilities [N, C] and the indices [N] of the right labels."""
    temperature, _ = fit_temperatures(method, logs, truth)
    return Confidence(temperature, tuple(curve(probabilities(logs, temperature), truth, MAX_POINTS)), len(truth))


def fit_temperatures(method: str, logs: Array, truth: NDArray[np.int64]) -> tuple[float, Array]:
    """Return the temperature with the lowest negative log-likelihood, and for each example that of the others, [N].

    The default is a prior, which determines the result if there are few examples. If all are answered correctly, the
    temperature is at most the default, and lower with more examples.
    """
    # in a random order: examples are often stored with their labels in turn
    chosen = np.random.default_rng(0).permutation(len(truth))[:MAX_FITTED]
    default = DEFAULT_TEMPERATURES[method]
    tried = default * MULTIPLES
    of_each = _surprises(logs[chosen], truth[chosen], tried)
    total = of_each.sum(1) + (np.log(MULTIPLES) / SPREAD) ** 2 / 2
    fitted = float(tried[total.argmin()])
    without = np.full(len(truth), fitted)
    without[chosen] = tried[(total[:, None] - of_each).argmin(0)]
    return fitted, without


def probabilities(logs: Array, temperature: float | Array) -> Array:
    """Return the probabilities of candidates, [..., C], from their log-probabilities at a temperature."""
    return np.exp(log_softmax(logs / temperature))


def _surprises(logs: Array, truth: NDArray[np.int64], temperatures: Array) -> Array:
    """Return the negative log-likelihood in nats of each right label at each temperature, [T, N]."""
    rows = np.arange(len(truth))
    return np.stack([-log_softmax(logs / temperature)[rows, truth] for temperature in temperatures])


def curve(probabilities: Array, truth: NDArray[np.int64], max_points: int) -> list[CurvePoint]:
    """Return up to `max_points` points of growing coverage for probabilities [N, C]; the last point answers everything.

    Examples with equal confidence are answered together.
    """
    confidence = probabilities.max(1)
    order = np.argsort(-confidence, kind="stable")
    confidence, is_correct = confidence[order], (probabilities.argmax(1) == truth)[order]
    counts = np.arange(1, len(order) + 1)
    ends = np.flatnonzero(np.append(confidence[1:] < confidence[:-1], True))
    if len(ends) > max_points:
        ends = ends[np.linspace(0, len(ends) - 1, max_points).round().astype(int)]
    thresholds = np.append(np.nextafter(confidence[ends[:-1]], ALWAYS), ALWAYS)
    accuracy, mean = (np.cumsum(values) / counts for values in (is_correct, confidence))
    return [
        CurvePoint(float(threshold), float(counts[end] / len(order)), float(accuracy[end]), float(mean[end]))
        for threshold, end in zip(thresholds, ends, strict=True)
    ]


def threshold_of_accuracy(points: Sequence[CurvePoint], target: float) -> float:
    """Return the lowest threshold above which answers are accurate enough, by two estimates; `NEVER` if there is none.

    Both the accuracy of the answers and their mean probability must reach the target. The first is coarse if few examples
    are answered; the second depends on the temperature.
    """
    accurate = [point.threshold for point in points if min(point.accuracy, point.confidence) >= target]
    return min(accurate, default=NEVER)


def threshold_of_coverage(points: Sequence[CurvePoint], target: float, num_left_out: int) -> float:
    """Return the highest threshold that new queries are expected to exceed in at least the target share.

    The confidence of a query that is like the examples exceeds that of k of N of them with the probability k / (N + 1).
    """
    counts = [(point.threshold, round(point.coverage * num_left_out)) for point in points]
    return max((threshold for threshold, k in counts if k / (num_left_out + 1) >= target), default=ALWAYS)
