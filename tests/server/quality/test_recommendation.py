"""The results of an evaluation by setting, and the setting that it recommends."""

from __future__ import annotations

from typing import Any

import pytest

from server.quality.evaluation import Cell, failed_cell
from server.quality.measures import standard_error
from server.quality.recommendation import Baseline, baseline, explain, recommend, summarise


def likeness_record(method: str, accuracy: float) -> dict[str, Any]:
    return cell_record("", 0, accuracy, method=method) | {"strategy": None, "k": None, "seed": None}


def cell_record(
    strategy: str, k: int, accuracy: float, seed: int = 0, queries: int = 100, method: str = "in_context"
) -> dict[str, Any]:
    return {
        "method": method,
        "strategy": strategy,
        "k": k,
        "seed": seed,
        "status": "completed",
        "queries": queries,
        "accuracy": accuracy,
        "expected_calibration_error": 0.1,
        "brier": 0.2,
        "nll": 0.3,
        "temperature": 1.0 + seed,
        "curve": [{"threshold": 0.0, "coverage": 1.0, "accuracy": accuracy, "confidence": accuracy}],
        "cost": {"prompt_tokens": 10.0 * k},
    }


def test_seeds_are_averaged_and_do_not_narrow_the_interval() -> None:
    (single,) = summarise([cell_record("random", 2, 0.6)])
    (three,) = summarise([cell_record("random", 2, accuracy, seed) for seed, accuracy in enumerate((0.5, 0.7, 0.6))])
    assert three["accuracy"] == pytest.approx(0.6)
    assert three["accuracy_interval"] == pytest.approx(single["accuracy_interval"])
    assert (three["lowest_accuracy"], three["highest_accuracy"], three["best_seed"]) == (0.5, 0.7, 1)
    assert (three["temperature"], three["curve"][0]["accuracy"]) == (2.0, 0.7)


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
    assert recommendation["method"] == "in_context"
    assert recommendation["reason"] == (
        "in_context by rices_image with k=4 has an accuracy of 0.875 on 100 left-out examples (95% interval 0.796 to "
        "0.926), with 40 prompt tokens per query. The most accurate setting, in_context by random with k=16, has 0.900 "
        "with 160 prompt tokens per query; the difference is within one standard error (0.030)."
    )


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
    assert recommended(cells)["temperature"] == 2.0


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


def test_no_setting_below_the_most_frequent_label_is_recommended() -> None:
    rows = summarise([cell_record("random", 2, 0.2), likeness_record("knn", 0.29)])
    assert recommend(rows, "set_1", 3, None, ALWAYS) is None
    assert explain(rows, ALWAYS, []) == (
        "No setting is recommended: the most accurate one, knn, has an accuracy of 0.290 on 100 left-out examples, less "
        "than always answering 'cat', whose accuracy is 0.300."
    )


def test_a_cheap_setting_below_the_most_frequent_label_is_passed_over() -> None:
    """Although it is within one standard error of the most accurate setting."""
    rows = summarise([cell_record("random", 4, 0.31), likeness_record("knn", 0.29)])
    recommendation = recommend(rows, "set_1", 3, None, ALWAYS)
    assert recommendation is not None
    assert recommendation["method"] == "in_context"
    assert explain(rows, ALWAYS, []) is None


def test_a_label_of_one_example_is_named() -> None:
    rows = summarise([cell_record("random", 2, 0.5)])
    assert explain(rows, ALWAYS, ["dog"]) == (
        "The label 'dog' has a single example. When that is left out, none of its label is left, so leave-one-out cannot "
        "judge it: add a second example."
    )
    assert explain([], ALWAYS, ["dog", "emu", "fox"]) == (
        "3 labels, 'dog' among them, have a single example each. When that is left out, none of its label is left, so "
        "leave-one-out cannot judge it: add a second example of each."
    )


def test_baseline() -> None:
    assert baseline(["dog", "cat", "cat"]) == Baseline("cat", 2 / 3)


def test_a_method_without_a_prompt_is_recommended_unless_a_prompt_is_clearly_better() -> None:
    by_likeness = [likeness_record("nearest_mean", 0.91), likeness_record("knn", 0.90)]
    close = recommended([*by_likeness, cell_record("random", 4, 0.92), cell_record("random", 4, 0.93, method="blend")])
    assert close["method"] == "nearest_mean"
    assert close["examples"] == {"support_set": "set_1", "version": 3}
    assert close["temperature"] is None
    assert close["reason"] == (
        "nearest_mean has an accuracy of 0.910 on 100 left-out examples (95% interval 0.838 to 0.952), without a prompt. "
        "The most accurate setting, blend by random with k=4, has 0.930 with 40 prompt tokens per query; the difference is "
        "within one standard error (0.026). Of the other methods, the best settings have: in_context 0.920, knn 0.900."
    )
    clear = recommended([*by_likeness, cell_record("random", 4, 0.99, method="blend")])
    assert (clear["method"], clear["examples"]["k"]) == ("blend", 4)
    assert "No other setting is more accurate." in clear["reason"]
