"""The arithmetic of a leave-one-out: cells that can differ, fair subsamples, and which setting is sent on."""

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


def test_only_what_is_drawn_runs_for_every_seed() -> None:
    cells = grid([2, 4], ["random", "rices_image"], [0, 1, 2], is_shuffled=False)
    assert Counter((cell.strategy, cell.k) for cell in cells) == {
        ("random", 2): 3,
        ("random", 4): 3,
        ("rices_image", 2): 1,
        ("rices_image", 4): 1,
    }


def test_drawn_orders_make_every_seed_count_from_two_shots_on() -> None:
    cells = grid([1, 2], ["first"], [0, 1], is_shuffled=True)
    assert cells == [Cell("first", 1, 0), Cell("first", 2, 0), Cell("first", 2, 1)]


def test_no_shots_are_one_cell_and_doubles_run_once() -> None:
    assert grid([0, 0], ["random", "rices_image", "random"], [5, 6], is_shuffled=True) == [Cell("first", 0, 5)]


def test_a_subsample_keeps_the_shares_of_labels() -> None:
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    picked = stratified(labels, 10, seed=1)
    assert Counter(labels[place] for place in picked) == {"a": 6, "b": 3, "c": 1}
    assert picked == sorted(set(picked))
    assert picked == stratified(labels, 10, seed=1)
    assert picked != stratified(labels, 10, seed=2)


@pytest.mark.parametrize("count", range(1, 12))
def test_a_subsample_has_the_size_asked_for_and_is_off_by_less_than_one(count: int) -> None:
    labels = ["a", "b", "b", "c", "c", "c", "a", "d", "e", "e", "e"]
    drawn = Counter(labels[place] for place in stratified(labels, count, seed=0))
    assert drawn.total() == count
    assert all(abs(drawn[label] - count * labels.count(label) / 11) < 1 for label in "abcde")


def test_all_are_taken_where_there_are_no_more() -> None:
    assert stratified(["a", "b"], 5, seed=0) == [0, 1]


def outcome(truth: int, probabilities: list[float], seconds: float | None = None) -> Outcome:
    return Outcome(truth, probabilities, 10 + truth, 4, 3, truth, seconds)


def test_a_cell_is_remembered_with_cost_and_latency() -> None:
    outcomes = [outcome(0, [0.7, 0.3]), outcome(1, [0.4, 0.6], 0.25), outcome(1, [0.8, 0.2], 0.75)]
    result = cell_result(Cell("random", 2, 7), outcomes, ["cat", "dog"])
    assert (result["strategy"], result["k"], result["seed"], result["status"]) == ("random", 2, 7, "completed")
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["confusion"] == {"cat": {"cat": 1}, "dog": {"dog": 1, "cat": 1}}
    assert result["cost"] == pytest.approx(
        {"prompt_tokens": 32 / 3, "cached_tokens": 4, "media": 3, "media_encoded": 2 / 3}
    )
    assert result["latency"] == {"queries": 2, "median_seconds": 0.5, "p90_seconds": pytest.approx(0.7)}


def made(strategy: str, k: int, accuracy: float, seed: int = 0, queries: int = 100) -> dict[str, Any]:
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
    (one,) = summarise([made("random", 2, 0.6)])
    (three,) = summarise([made("random", 2, accuracy, seed) for seed, accuracy in enumerate((0.5, 0.7, 0.6))])
    assert three["accuracy"] == pytest.approx(0.6)
    assert three["accuracy_interval"] == pytest.approx(one["accuracy_interval"])
    assert (three["lowest_accuracy"], three["highest_accuracy"], three["best_seed"]) == (0.5, 0.7, 1)


ALWAYS = Baseline("cat", 0.3)


def recommended(cells: list[dict[str, Any]], always: Baseline = ALWAYS) -> dict[str, Any]:
    found = recommend(summarise(cells), "set_1", 3, None, always)
    assert found is not None
    return found


def test_the_smallest_k_within_a_standard_error_is_recommended() -> None:
    error = standard_error(90, 100)
    assert 0.02 < error < 0.04
    cells = [made("random", 16, 0.90), made("random", 8, 0.88), made("rices_image", 4, 0.875), made("first", 2, 0.8)]
    found = recommended(cells)
    assert found["examples"] == {"support_set": "set_1", "version": 3, "k": 4, "strategy": "rices_image", "seed": 0}
    assert "rices_image with k=4" in found["reason"]
    assert "random with k=16" in found["reason"]


def test_a_clear_winner_is_recommended_with_all_its_shots() -> None:
    found = recommended([made("random", 16, 0.95), made("random", 8, 0.7)])
    assert found["examples"]["k"] == 16
    assert "No other setting" in found["reason"]


def test_of_equal_k_the_more_accurate_strategy_and_its_best_seed() -> None:
    cells = [made("random", 4, 0.84, 0), made("random", 4, 0.88, 1), made("first", 4, 0.85), made("random", 8, 0.86)]
    assert recommended(cells)["examples"]["strategy"] == "random"
    assert recommended(cells)["examples"]["seed"] == 1


def test_what_is_no_better_than_the_commonest_label_is_said_to_be_so() -> None:
    cells = [made("random", 4, 0.5)]
    assert "always answering 'cat'" in recommended(cells, Baseline("cat", 0.45))["reason"]
    assert "always answering" not in recommended(cells)["reason"]


def test_failed_cells_are_left_out() -> None:
    failed = failed_cell(Cell("random", 64, 0), "context_length_exceeded", "too long")
    assert recommended([failed, made("random", 2, 0.5)])["examples"]["k"] == 2
    assert recommend(summarise([failed]), "set_1", 3, None, ALWAYS) is None


def test_the_order_that_was_measured_is_sent_on() -> None:
    found = recommend(summarise([made("random", 2, 0.5)]), "set_1", 3, "shuffled", ALWAYS)
    assert found is not None
    assert found["examples"]["order"] == "shuffled"


def test_baseline() -> None:
    assert baseline(["dog", "cat", "cat"]) == Baseline("cat", 2 / 3)
