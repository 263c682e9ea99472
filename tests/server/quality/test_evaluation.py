"""The arithmetic of leave-one-out evaluation: distinct cells, stratified subsamples, and the record of a cell."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from model.prompt import ShotsAttend
from server.fewshot.confidence import probabilities
from server.fewshot.methods.likeness import log_softmax
from server.quality.evaluation import Cell, Outcome, PromptSetting, cell_result, grid, left_out_together, stratified
from server.quality.measures import Predictions


def test_only_random_strategies_run_for_every_seed() -> None:
    cells = grid([2, 4], ["random", "rices_image"], ["previous"], [0, 1, 2])
    assert Counter((cell.strategy, cell.k) for cell in cells) == {
        ("random", 2): 3,
        ("random", 4): 3,
        ("rices_image", 2): 1,
        ("rices_image", 4): 1,
    }


def test_shuffled_orders_run_for_every_seed_from_two_shots_on() -> None:
    cells = grid([1, 2], ["first"], ["previous"], [0, 1], shuffled=["previous"])
    assert cells == [PromptSetting("first", 1, 0), PromptSetting("first", 2, 0), PromptSetting("first", 2, 1)]


def test_an_order_is_drawn_for_each_seed_only_in_the_forms_in_which_it_has_an_effect() -> None:
    cells = grid([2], ["first"], ["previous", "alone"], [0, 1], shuffled=["previous"])
    assert [(cell.shots_attend, cell.seed) for cell in cells] == [("previous", 0), ("previous", 1), ("alone", 0)]
    both = grid([2], ["random"], ["alone", "previous"], [0, 1])
    assert [(cell.shots_attend, cell.seed) for cell in both] == [
        (form, seed) for form in ("alone", "previous") for seed in (0, 1)
    ]


def test_zero_shots_are_one_cell_and_duplicates_run_once() -> None:
    forms: list[ShotsAttend] = ["alone", "previous"]
    cells = grid([0, 0], ["random", "rices_image", "random"], forms, [5, 6], shuffled=forms)
    assert cells == [PromptSetting("first", 0, 5)]


def test_a_subsample_keeps_the_shares_of_labels() -> None:
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    sample = stratified(labels, 10, seed=1)
    assert Counter(labels[index] for index in sample) == {"a": 6, "b": 3, "c": 1}
    assert sample == sorted(set(sample))
    assert sample == stratified(labels, 10, seed=1)
    assert sample != stratified(labels, 10, seed=2)


@pytest.mark.parametrize("count", range(1, 12))
def test_a_subsample_has_the_requested_size_and_shares_within_one(count: int) -> None:
    labels = ["a", "b", "b", "c", "c", "c", "a", "d", "e", "e", "e"]
    counts = Counter(labels[index] for index in stratified(labels, count, seed=0))
    assert counts.total() == count
    assert all(abs(counts[label] - count * labels.count(label) / 11) < 1 for label in "abcde")


def test_a_small_set_is_taken_whole() -> None:
    assert stratified(["a", "b"], 5, seed=0) == [0, 1]


def test_one_example_of_each_other_label_is_left_out_with_a_query() -> None:
    together = left_out_together(["a", "b", "a", "b", "c", "a", "d"])
    assert together(0) == [0, 1]
    assert together(1) == [1, 0]
    assert together(3) == [3, 2]
    assert together(5) == [5]  # the others of its label are in turns of their own
    assert together(4) == [4]  # the only one of its label stays for the others
    three = left_out_together(list("abcabc"))
    assert [three(index) for index in (0, 1, 5)] == [[0, 1, 2], [1, 2, 0], [5, 3, 4]]


def outcome(truth: int, probabilities: list[float], seconds: float | None = None) -> Outcome:
    return Outcome(truth, {"in_context": np.log(probabilities)}, 10 + truth, 4, 3, truth, seconds)


def test_the_record_of_a_cell_has_cost_and_latency() -> None:
    outcomes = [outcome(0, [0.7, 0.3]), outcome(1, [0.4, 0.6], 0.25), outcome(1, [0.8, 0.2], 0.75)]
    result = cell_result(Cell("random", 2, 7), outcomes, ["cat", "dog"], None)
    assert (result["strategy"], result["k"], result["seed"], result["status"]) == ("random", 2, 7, "completed")
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["is_correct"] == [True, True, False]
    assert result["answers"] == ["cat", "dog", "cat"]
    assert result["confusion"] == {"cat": {"cat": 1}, "dog": {"dog": 1, "cat": 1}}
    assert result["cost"] == pytest.approx(
        {"prompt_tokens": 32 / 3, "cached_tokens": 4, "media": 3, "media_encoded": 2 / 3}
    )
    assert result["latency"] == {"queries": 2, "median_seconds": 0.5, "p90_seconds": pytest.approx(0.7)}


def test_the_measures_of_a_cell_are_of_examples_that_its_temperature_was_not_fitted_to() -> None:
    """A temperature that is fitted to everything would seem to give better probabilities than new queries have."""
    rng, labels = np.random.default_rng(0), ["cat", "dog", "cow"]
    logs, truth = log_softmax(rng.normal(size=(2, 12, 3)) * 4), rng.integers(0, 3, 12)
    outcomes = [
        Outcome(int(label), {"in_context": logs[0, index], "nearest_mean": logs[1, index]})
        for index, label in enumerate(truth)
    ]
    result = cell_result(Cell("random", 2, 7, "blend"), outcomes, labels, None)
    blended = log_softmax(logs.sum(0))  # the parts have fixed weights: none is fitted
    seeming = Predictions(probabilities(blended, result["temperature"]), truth)
    assert result["nll"] > seeming.nll() + 0.05
    assert result["is_correct"] == (blended.argmax(1) == truth).tolist()


def test_a_blend_multiplies_the_probabilities_of_its_parts() -> None:
    logs = {"in_context": np.log([0.8, 0.2]), "nearest_mean": np.log([0.1, 0.9])}
    outcome = Outcome(0, logs)
    assert np.exp(outcome.log_probabilities(Cell(method="in_context"))) == pytest.approx([0.8, 0.2])
    assert np.exp(outcome.log_probabilities(Cell(method="nearest_mean"))) == pytest.approx([0.1, 0.9])
    assert np.exp(outcome.log_probabilities(Cell(method="blend"))) == pytest.approx([0.08 / 0.26, 0.18 / 0.26])
