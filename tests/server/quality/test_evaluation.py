"""The arithmetic of leave-one-out evaluation: distinct cells, stratified subsamples, and the recommended setting."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from server.quality.evaluation import (
    Baseline,
    Cell,
    Outcome,
    baseline,
    cell_result,
    failed_cell,
    grid,
    recommend,
    stratified,
    summarise,
)
from server.quality.measures import standard_error


def test_only_random_strategies_run_for_every_seed() -> None:
    cells = grid([2, 4], ["random", "rices_image"], [0, 1, 2], is_shuffled=False)
    assert Counter((cell.strategy, cell.k) for cell in cells) == {
        ("random", 2): 3,
        ("random", 4): 3,
        ("rices_image", 2): 1,
        ("rices_image", 4): 1,
    }


def test_shuffled_orders_run_for_every_seed_from_two_shots_on() -> None:
    cells = grid([1, 2], ["first"], [0, 1], is_shuffled=True)
    assert cells == [Cell("first", 1, 0), Cell("first", 2, 0), Cell("first", 2, 1)]


def test_zero_shots_are_one_cell_and_duplicates_run_once() -> None:
    assert grid([0, 0], ["random", "rices_image", "random"], [5, 6], is_shuffled=True) == [Cell("first", 0, 5)]


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


def outcome(truth: int, probabilities: list[float], seconds: float | None = None) -> Outcome:
    return Outcome(truth, probabilities, 10 + truth, 4, 3, truth, seconds)


def test_the_record_of_a_cell_has_cost_and_latency() -> None:
    outcomes = [outcome(0, [0.7, 0.3]), outcome(1, [0.4, 0.6], 0.25), outcome(1, [0.8, 0.2], 0.75)]
    result = cell_result(Cell("random", 2, 7), outcomes, ["cat", "dog"])
    assert (result["strategy"], result["k"], result["seed"], result["status"]) == ("random", 2, 7, "completed")
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["confusion"] == {"cat": {"cat": 1}, "dog": {"dog": 1, "cat": 1}}
    assert result["cost"] == pytest.approx(
        {"prompt_tokens": 32 / 3, "cached_tokens": 4, "media": 3, "media_encoded": 2 / 3}
    )
    assert result["latency"] == {"queries": 2, "median_seconds": 0.5, "p90_seconds": pytest.approx(0.7)}


def cell_record(strategy: str, k: int, accuracy: float, seed: int = 0, queries: int = 100) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "k": k,
        "seed": seed,
        "status": "completed",
        "queries": queries,
        "accuracy": accuracy,
        "expected_calibration_error": 0.1,
        "brier": 0.2,
        "nll": 0.3,
        "cost": {"prompt_tokens": 10.0 * k},
    }


def test_seeds_are_averaged_and_do_not_narrow_the_interval() -> None:
    (single,) = summarise([cell_record("random", 2, 0.6)])
    (three,) = summarise([cell_record("random", 2, accuracy, seed) for seed, accuracy in enumerate((0.5, 0.7, 0.6))])
    assert three["accuracy"] == pytest.approx(0.6)
    assert three["accuracy_interval"] == pytest.approx(single["accuracy_interval"])
    assert (three["lowest_accuracy"], three["highest_accuracy"], three["best_seed"]) == (0.5, 0.7, 1)


ALWAYS = Baseline("cat", 0.3)


def recommended(cells: list[dict[str, Any]], always: Baseline = ALWAYS) -> dict[str, Any]:
    recommendation = recommend(summarise(cells), "set_1", 3, None, always)
    assert recommendation is not None
    return recommendation


def test_the_smallest_k_within_a_standard_error_is_recommended() -> None:
    error = standard_error(90, 100)
    assert 0.02 < error < 0.04
    cells = [
        cell_record("random", 16, 0.90),
        cell_record("random", 8, 0.88),
        cell_record("rices_image", 4, 0.875),
        cell_record("first", 2, 0.8),
    ]
    recommendation = recommended(cells)
    assert recommendation["examples"] == {
        "support_set": "set_1",
        "version": 3,
        "k": 4,
        "strategy": "rices_image",
        "seed": 0,
    }
    assert "rices_image with k=4" in recommendation["reason"]
    assert "random with k=16" in recommendation["reason"]


def test_a_clear_winner_is_recommended_with_all_its_shots() -> None:
    recommendation = recommended([cell_record("random", 16, 0.95), cell_record("random", 8, 0.7)])
    assert recommendation["examples"]["k"] == 16
    assert "No other setting" in recommendation["reason"]


def test_the_most_accurate_strategy_of_a_k_and_its_best_seed_are_recommended() -> None:
    cells = [
        cell_record("random", 4, 0.84, 0),
        cell_record("random", 4, 0.88, 1),
        cell_record("first", 4, 0.85),
        cell_record("random", 8, 0.86),
    ]
    assert recommended(cells)["examples"]["strategy"] == "random"
    assert recommended(cells)["examples"]["seed"] == 1


def test_the_reason_compares_with_the_most_frequent_label() -> None:
    cells = [cell_record("random", 4, 0.5)]
    assert "always answering 'cat'" in recommended(cells, Baseline("cat", 0.45))["reason"]
    assert "always answering" not in recommended(cells)["reason"]


def test_failed_cells_are_left_out() -> None:
    failed = failed_cell(Cell("random", 64, 0), "context_length_exceeded", "too long")
    assert recommended([failed, cell_record("random", 2, 0.5)])["examples"]["k"] == 2
    assert recommend(summarise([failed]), "set_1", 3, None, ALWAYS) is None


def test_the_recommendation_has_the_order_that_was_measured() -> None:
    recommendation = recommend(summarise([cell_record("random", 2, 0.5)]), "set_1", 3, "shuffled", ALWAYS)
    assert recommendation is not None
    assert recommendation["examples"]["order"] == "shuffled"


def test_baseline() -> None:
    assert baseline(["dog", "cat", "cat"]) == Baseline("cat", 2 / 3)
