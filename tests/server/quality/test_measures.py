"""Each measure against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from server.quality.measures import Predictions, standard_error, wilson


def predictions(rows: list[list[float]], truth: list[int]) -> Predictions:
    return Predictions(np.array(rows), np.array(truth))


@pytest.mark.parametrize(
    ("num_correct", "total", "low", "high"),
    # the roots of (share - p)^2 = z^2 p (1 - p) / n, solved independently
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (50, 100, 0.403832, 0.596168), (8, 10, 0.490162, 0.943318)],
)
def test_wilson(num_correct: int, total: int, low: float, high: float) -> None:
    assert wilson(num_correct, total) == pytest.approx((low, high), abs=1e-6)
    for bound in wilson(num_correct, total):
        if 0 < bound < 1:
            share = num_correct / total
            assert (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / total, rel=1e-5)


@pytest.mark.parametrize("total", [1, 10, 13, 25, 613])
def test_an_interval_has_the_proportion_although_numbers_are_rounded(total: int) -> None:
    assert wilson(total, total)[1] == 1
    assert wilson(0, total)[0] == 0


def test_standard_error_is_the_normal_one_for_large_samples_and_never_zero() -> None:
    assert standard_error(5000, 10000) == pytest.approx(0.005, rel=1e-3)
    assert standard_error(20, 20) > 0.02


ROWS = [[0.9, 0.1], [0.8, 0.2], [0.35, 0.65], [0.55, 0.45]]
TRUTH = [0, 1, 1, 0]


def test_accuracy_and_confusion() -> None:
    summary = predictions(ROWS, TRUTH).summary(["cat", "dog"])
    assert summary["accuracy"] == 0.75
    assert summary["confusion"] == {"cat": {"cat": 2}, "dog": {"cat": 1, "dog": 1}}
    assert summary["accuracy_interval"] == list(wilson(3, 4))


def test_brier_and_likelihood() -> None:
    measured = predictions(ROWS, TRUTH)
    assert measured.brier() == pytest.approx(2 * (0.1**2 + 0.8**2 + 0.35**2 + 0.45**2) / 4)
    assert measured.nll() == pytest.approx(-sum(map(math.log, (0.9, 0.2, 0.65, 0.55))) / 4)
    assert predictions([[1.0, 0.0]], [1]).brier() == 2.0
    assert predictions([[1.0, 0.0]], [1]).nll() == pytest.approx(100.0)


def test_calibration_error() -> None:
    # two predictions in each of two bins: one of 0.85 and 0.82 is correct; both of 0.65 and 0.66 are
    measured = predictions([[0.85, 0.15], [0.82, 0.18], [0.35, 0.65], [0.34, 0.66]], [0, 1, 1, 1])
    expected = (2 * abs((0.85 + 0.82) / 2 - 0.5) + 2 * abs(0.655 - 1.0)) / 4
    assert measured.calibration_error() == pytest.approx(expected)
    filled = [(b.low, b.count) for b in measured.bins() if b.count]
    assert filled == [(0.6, 2), (0.8, 2)]


def test_each_prediction_is_in_one_bin_and_certainty_is_in_the_last() -> None:
    measured = predictions([[1.0, 0.0], [0.5, 0.5]], [0, 0])
    assert measured.bins()[-1].count == 1
    assert sum(b.count for b in measured.bins()) == 2
    assert measured.calibration_error() == pytest.approx(0.25)


def test_probabilities_drawn_from_the_truth_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    rows = rng.dirichlet([1.0, 1.0, 1.0], size=20000)
    truth = (rng.random(20000)[:, None] > rows.cumsum(1)).sum(1)
    calibrated, overconfident = Predictions(rows, truth), Predictions(rows**8 / (rows**8).sum(1, keepdims=True), truth)
    assert calibrated.calibration_error() < 0.01
    assert overconfident.calibration_error() > 0.2
    assert calibrated.nll() < overconfident.nll()
    assert calibrated.brier() < overconfident.brier()
