"""Temperatures that are fitted to left-out examples, and the thresholds of their confidence."""

from __future__ import annotations

import numpy as np
import pytest

from server.fewshot.confidence import (
    ALWAYS,
    DEFAULT_TEMPERATURES,
    MAX_FITTED,
    NEVER,
    curve,
    fit_confidence,
    fit_temperatures,
    probabilities,
    threshold_of_accuracy,
    threshold_of_coverage,
)
from server.fewshot.methods.likeness import Array, log_softmax
from server.schemas.responses.evaluations import CurvePoint

METHOD = "nearest_mean"
DEFAULT = DEFAULT_TEMPERATURES[METHOD]


def sampled(number: int, temperature: float, seed: int = 0) -> tuple[Array, np.ndarray]:
    """Return log-probabilities that hold at a temperature, and right labels that are drawn from them at it."""
    rng = np.random.default_rng(seed)
    logs = log_softmax(rng.normal(size=(number, 4)) * 2)
    truth = np.array([rng.choice(4, p=row) for row in np.exp(logs)])
    return log_softmax(logs * temperature), truth


@pytest.mark.parametrize("multiple", [0.25, 1, 5])
def test_the_temperature_is_the_one_at_which_the_probabilities_hold(multiple: float) -> None:
    logs, truth = sampled(MAX_FITTED, multiple * DEFAULT)
    assert fit_temperatures(METHOD, logs, truth)[0] == pytest.approx(multiple * DEFAULT, rel=0.2)


def test_the_default_decides_where_the_examples_do_not() -> None:
    sure = np.array([[0.0, -1e4], [-1e4, 0.0]])
    assert fit_temperatures(METHOD, sure, np.array([0, 1]))[0] == DEFAULT
    single_label = np.zeros((3, 1))
    assert fit_temperatures(METHOD, single_label, np.zeros(3, int))[0] == DEFAULT


def test_a_few_examples_move_the_temperature_less_than_many() -> None:
    logs, truth = sampled(MAX_FITTED, 5 * DEFAULT)
    few, many = (fit_temperatures(METHOD, logs[:number], truth[:number])[0] for number in (10, MAX_FITTED))
    assert DEFAULT < few < many


def test_the_temperature_of_many_examples_depends_little_on_their_order() -> None:
    """Examples with two labels in turn, of which one is hard: every second example would be of one label."""
    (easy, right), (hard, wrong) = sampled(MAX_FITTED, DEFAULT), sampled(MAX_FITTED, 8 * DEFAULT, seed=1)
    in_turn = np.stack([easy, hard], axis=1).reshape(-1, 4), np.stack([right, wrong], axis=1).reshape(-1)
    by_label = np.concatenate([easy, hard]), np.concatenate([right, wrong])
    fitted, without = fit_temperatures(METHOD, *in_turn)
    assert fitted == pytest.approx(fit_temperatures(METHOD, *by_label)[0], rel=0.2)
    assert fitted > 1.5 * fit_temperatures(METHOD, easy, right)[0]
    assert np.mean(without == fitted) >= 0.5


def test_the_temperature_is_below_the_default_if_all_examples_are_classified_correctly() -> None:
    logs = log_softmax(np.tile([8.0, 0, 0, 0], (100, 1)))
    assert fit_temperatures(METHOD, logs, np.zeros(100, np.int64))[0] < DEFAULT


def test_the_temperature_of_an_example_is_fitted_to_the_others() -> None:
    logs, truth = sampled(12, 2 * DEFAULT)
    _, without = fit_temperatures(METHOD, logs, truth)
    for index in range(len(truth)):
        is_kept = np.arange(len(truth)) != index
        assert without[index] == fit_temperatures(METHOD, logs[is_kept], truth[is_kept])[0]


@pytest.mark.parametrize("temperature", [1e-3, 0.3, 7.0, 1e3])
def test_no_temperature_changes_which_candidate_is_the_most_probable(temperature: float) -> None:
    logs = log_softmax(np.random.default_rng(1).normal(size=(200, 5)) * 20)
    assert probabilities(logs, temperature).argmax(1).tolist() == logs.argmax(1).tolist()
    assert probabilities(logs, temperature).sum(1) == pytest.approx(np.ones(200))


# the confidence of five answers, of which the third and the last are wrong; two are equally sure
SURE = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.7, 0.3], [0.6, 0.4]])
TRUTH = np.array([0, 1, 0, 0, 1])


def test_a_curve_goes_from_the_surest_answers_to_all() -> None:
    points = curve(SURE, TRUTH, 20)
    assert [(point.coverage, point.accuracy) for point in points] == [(0.2, 1.0), (0.4, 1.0), (0.8, 0.75), (1.0, 0.6)]
    assert [point.confidence for point in points] == pytest.approx([0.9, 0.85, 0.775, 0.74])
    for point in points:
        assert (SURE.max(1) > point.threshold).mean() == point.coverage
    assert points[-1].threshold == ALWAYS


def test_a_long_curve_keeps_its_ends() -> None:
    logs, truth = sampled(300, 1.0)
    whole, short = (curve(np.exp(logs), truth, limit) for limit in (300, 20))
    assert len(whole) == 300
    assert len(short) == 20
    assert (short[0], short[-1]) == (whole[0], whole[-1])
    assert set(short) <= set(whole)


def test_the_threshold_is_the_lowest_that_is_accurate_enough_by_both_estimates() -> None:
    points = curve(SURE, TRUTH, 20)
    assert threshold_of_accuracy(points, 0.5) == ALWAYS
    assert threshold_of_accuracy(points, 0.75) == points[2].threshold
    # three quarters of four answers are right, but their mean probability is higher
    assert threshold_of_accuracy(points, 0.77) == points[1].threshold
    # both answers are right, but their mean probability is lower
    assert threshold_of_accuracy(points, 0.88) == points[0].threshold
    assert threshold_of_accuracy(points, 0.95) == NEVER


def test_the_threshold_of_a_coverage_is_the_highest_that_new_queries_exceed_as_often() -> None:
    points = curve(SURE, TRUTH, 20)
    thresholds = [threshold_of_coverage(points, target, len(TRUTH)) for target in (0.1, 0.2, 0.3, 0.5, 0.8, 0.9)]
    assert thresholds == [points[index].threshold for index in (0, 1, 1, 2, 3, 3)]
    # 7 / (49 + 1) is the target exactly
    points = curve(np.stack([np.linspace(0.9, 0.6, 49), np.linspace(0.1, 0.4, 49)], axis=1), np.zeros(49, int), 49)
    assert threshold_of_coverage(points, 0.14, 49) == points[6].threshold
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(2000):
        confidence, new = rng.uniform(0.5, 1, 9), rng.uniform(0.5, 1)
        answers = np.stack([confidence, 1 - confidence], axis=1)
        shares.append(new > threshold_of_coverage(curve(answers, np.zeros(9, int), 20), 0.6, 9))
    assert np.mean(shares) == pytest.approx(0.6, abs=0.04)


def test_answers_with_a_probability_of_one_are_above_a_threshold() -> None:
    (point,) = curve(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 0]), 20)
    assert point == CurvePoint(ALWAYS, 1.0, 1.0, 1.0)
    first, _ = curve(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 1]), 20)
    assert first.threshold < 1.0


def test_the_confidence_of_a_method_has_its_curve_at_its_temperature() -> None:
    logs, truth = sampled(40, DEFAULT)
    confidence = fit_confidence(METHOD, logs, truth)
    assert confidence.temperature == fit_temperatures(METHOD, logs, truth)[0]
    assert confidence.curve[-1].confidence == pytest.approx(probabilities(logs, confidence.temperature).max(1).mean())
