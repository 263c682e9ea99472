"""The results of an evaluation by setting, and the setting that it recommends."""

from __future__ import annotations

from typing import Any

import pytest

from server.fewshot.methods.paired import Paired
from server.quality.controls import judge_controls
from server.quality.evaluation import Cell, failed_cell
from server.quality.measures import standard_error
from server.quality.recommendation import Baseline, baseline, compare, explain, recommend, summarise


def likeness_record(method: str, accuracy: float) -> dict[str, Any]:
    without = dict.fromkeys(("strategy", "k", "seed", "shots_attend"))
    untimed = {"queries": 0, "median_seconds": None, "p90_seconds": None}
    return cell_record("", 0, accuracy, method=method) | without | {"latency": untimed}


def cell_record(
    strategy: str, k: int, accuracy: float, seed: int = 0, queries: int = 100, method: str = "in_context"
) -> dict[str, Any]:
    return {
        "method": method,
        "strategy": strategy,
        "k": k,
        "shots_attend": "previous",
        "seed": seed,
        "control": None,
        "status": "completed",
        "queries": queries,
        "accuracy": accuracy,
        "expected_calibration_error": 0.1,
        "brier": 0.2,
        "nll": 0.3,
        "temperature": 1.0 + seed,
        "curve": [{"threshold": 0.0, "coverage": 1.0, "accuracy": accuracy, "confidence": accuracy}],
        "cost": {"prompt_tokens": 10.0 * k},
        "latency": {"queries": 8, "median_seconds": 0.1 + seed, "p90_seconds": 0.2 + seed},
    }


def alone(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"shots_attend": "alone"}


def test_seeds_are_averaged_and_do_not_narrow_the_interval() -> None:
    (single,) = summarise([cell_record("random", 2, 0.6)])
    (three,) = summarise([cell_record("random", 2, accuracy, seed) for seed, accuracy in enumerate((0.5, 0.7, 0.6))])
    assert three["accuracy"] == pytest.approx(0.6)
    assert three["accuracy_interval"] == pytest.approx(single["accuracy_interval"])
    assert (three["lowest_accuracy"], three["highest_accuracy"], three["best_seed"]) == (0.5, 0.7, 1)
    assert (three["temperature"], three["curve"][0]["accuracy"]) == (2.0, 0.7)
    assert three["latency"] == pytest.approx({"queries": 24, "median_seconds": 1.1, "p90_seconds": 1.2})


def test_each_form_of_a_prompt_is_a_row() -> None:
    cells = [
        alone(cell_record("random", 2, 0.8)),
        cell_record("random", 2, 0.6),
        alone(cell_record("random", 2, 0.9, seed=1)),
        likeness_record("knn", 0.5),
    ]
    rows = [(row["shots_attend"], row["seeds"], row["accuracy"]) for row in summarise(cells)]
    assert rows == [(None, 1, 0.5), ("previous", 1, 0.6), ("alone", 2, pytest.approx(0.85))]
    assert summarise(cells)[0]["latency"] == {"queries": 0, "median_seconds": None, "p90_seconds": None}


ALWAYS = Baseline("cat", 0.3)


def recommended(cells: list[dict[str, Any]], always: Baseline = ALWAYS, prior: str | None = None) -> dict[str, Any]:
    recommendation = recommend(cells, "set_1", 3, None, always, prior)
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
    assert recommendation["request"]["examples"] == {
        "support_set": "set_1",
        "version": 3,
        "k": 4,
        "strategy": "rices_image",
        "seed": 0,
    }
    assert recommendation["request"]["method"] == "in_context"
    assert recommendation["reason"] == (
        "in_context by rices_image with k=4 has an accuracy of 0.875 on 100 left-out examples (95% interval 0.796 to "
        "0.926), with 40 prompt tokens per query. The most accurate setting, in_context by random with k=16, has 0.900 "
        "with 160 prompt tokens per query; the difference is within one standard error."
    )


def test_a_clear_winner_is_recommended_with_all_its_shots() -> None:
    recommendation = recommended([cell_record("random", 16, 0.95), cell_record("random", 8, 0.7)])
    assert recommendation["request"]["examples"]["k"] == 16
    assert "No other setting" in recommendation["reason"]


def test_the_most_accurate_strategy_of_a_k_and_its_best_seed_are_recommended() -> None:
    cells = [
        cell_record("random", 4, 0.84, 0),
        cell_record("random", 4, 0.88, 1),
        cell_record("first", 4, 0.85),
        cell_record("random", 8, 0.86),
    ]
    assert recommended(cells)["request"]["examples"]["strategy"] == "random"
    assert recommended(cells)["request"]["examples"]["seed"] == 1
    assert recommended(cells)["request"]["temperature"] == 2.0


def test_of_two_forms_of_a_prompt_the_more_accurate_one_is_recommended() -> None:
    cells = [cell_record("random", 4, 0.85), alone(cell_record("random", 4, 0.86))]
    recommendation = recommended(cells)
    assert (recommendation["request"]["shots_attend"], recommendation["request"]["examples"]["k"]) == ("alone", 4)
    assert recommendation["reason"].startswith(
        "in_context by random with k=4 and shots that attend alone has an accuracy"
    )
    assert "in_context by random with k=4 has 0.850" in recommendation["reason"]
    cells = [cell_record("random", 4, 0.86), alone(cell_record("random", 4, 0.85))]
    assert "shots_attend" not in recommended(cells)["request"]


def test_forms_are_compared_on_their_own_answers() -> None:
    cells = [answered(cell_record("random", 4, 0), "+++-"), alone(answered(cell_record("random", 4, 0), "++-+"))]
    previous, other = summarise(cells)
    assert compare(previous, other, cells) == Paired(1, 1, 0.0, 2.0)


def test_the_reason_compares_with_the_most_frequent_label() -> None:
    cells = [cell_record("random", 4, 0.5)]
    assert "always answering 'cat'" in recommended(cells, Baseline("cat", 0.45))["reason"]
    assert "always answering" not in recommended(cells)["reason"]


def test_failed_cells_are_left_out() -> None:
    failed = failed_cell(Cell("random", 64, 0), "context_length_exceeded", "too long")
    assert recommended([failed, cell_record("random", 2, 0.5)])["request"]["examples"]["k"] == 2
    assert recommend([failed], "set_1", 3, None, ALWAYS, None) is None


def test_the_recommendation_has_the_order_that_was_measured() -> None:
    recommendation = recommend([cell_record("random", 2, 0.5)], "set_1", 3, "shuffled", ALWAYS, None)
    assert recommendation is not None
    assert recommendation["request"]["examples"]["order"] == "shuffled"


def test_no_setting_without_a_lead_over_the_most_frequent_label_is_recommended() -> None:
    for accuracy in (0.29, 0.3):
        cells = [cell_record("random", 2, 0.2), likeness_record("knn", accuracy)]
        assert recommend(cells, "set_1", 3, None, ALWAYS, None) is None
        assert explain(summarise(cells), ALWAYS, [], lacks_likeness=False) == (
            f"No setting is recommended: the most accurate one, knn, has an accuracy of {accuracy:.3f} on 100 left-out "
            "examples, no more than always answering 'cat', whose accuracy is 0.300."
        )


def test_a_cheap_setting_below_the_most_frequent_label_is_passed_over() -> None:
    """Although it is within one standard error of the most accurate setting."""
    cells = [cell_record("random", 4, 0.31), likeness_record("knn", 0.29)]
    assert recommended(cells)["request"]["method"] == "in_context"
    assert explain(summarise(cells), ALWAYS, [], lacks_likeness=False) is None


def test_a_label_of_one_example_is_named() -> None:
    rows = summarise([cell_record("random", 2, 0.5)])
    assert explain(rows, ALWAYS, ["dog"], lacks_likeness=False) == (
        "The label 'dog' has a single example, so leave-one-out cannot judge it: add a second example."
    )
    assert explain([], ALWAYS, ["dog", "emu", "fox"], lacks_likeness=False) == (
        "3 labels, 'dog' among them, have a single example each, so leave-one-out cannot judge them: add a second example "
        "of each."
    )


def test_baseline() -> None:
    assert baseline(["dog", "cat", "cat"]) == Baseline("cat", 2 / 3)


def test_a_method_without_a_prompt_is_recommended_unless_a_prompt_is_clearly_better() -> None:
    by_likeness = [likeness_record("nearest_mean", 0.91), likeness_record("knn", 0.90)]
    close = recommended([*by_likeness, cell_record("random", 4, 0.92), cell_record("random", 4, 0.93, method="blend")])
    assert close["request"]["method"] == "nearest_mean"
    assert close["request"]["examples"] == {"support_set": "set_1", "version": 3}
    assert "temperature" not in close["request"]
    assert close["reason"] == (
        "nearest_mean has an accuracy of 0.910 on 100 left-out examples (95% interval 0.838 to 0.952), without a prompt. "
        "The most accurate setting, blend by random with k=4, has 0.930 with 40 prompt tokens per query; the difference is "
        "within one standard error. Of the other methods, the best settings have: in_context 0.920, knn 0.900."
    )
    clear = recommended([*by_likeness, cell_record("random", 4, 0.99, method="blend")])
    assert (clear["request"]["method"], clear["request"]["examples"]["k"]) == ("blend", 4)
    assert "No other setting is more accurate; nearest_mean has 0.910." in clear["reason"]


def answered(record: dict[str, Any], answers: str) -> dict[str, Any]:
    """Return the record with the answers of its queries: `+` for a correct one."""
    is_correct = [answer == "+" for answer in answers]
    accuracy = sum(is_correct) / len(is_correct)
    return record | {"is_correct": is_correct, "accuracy": accuracy, "queries": len(is_correct)}


def test_settings_are_compared_on_the_same_examples() -> None:
    """A lead of three examples without a loss is larger than its standard error, and one with two losses is not."""
    knn = answered(likeness_record("knn", 0), "-----" + "+" * 15)
    clear = answered(cell_record("random", 4, 0), "+++--" + "+" * 15)
    open_ = answered(cell_record("random", 4, 0), "+++++" + "+" * 13 + "--")
    assert recommended([knn, clear])["request"]["method"] == "in_context"
    assert recommended([knn, open_])["request"]["method"] == "knn"


def test_the_reason_says_whether_a_lead_is_more_than_chance() -> None:
    always = Baseline("cat", 0.5, tuple([True] * 10 + [False] * 10))
    knn = answered(likeness_record("knn", 0), "+" * 12 + "-" * 8)
    near = answered(likeness_record("linear", 0), "-" * 2 + "+" * 9 + "-" * 9)
    far = answered(likeness_record("linear", 0), "-" * 12 + "+" + "-" * 7)
    assert recommended([knn, near], always)["reason"] == (
        "knn has an accuracy of 0.600 on 20 left-out examples (95% interval 0.387 to 0.781), without a prompt. No other "
        "setting is more accurate; linear has 0.450. knn alone is right on 3 of them, linear alone on 0: this may be "
        "chance (p = 0.25 by a sign test). Its lead over always answering 'cat' (0.500) may be chance (p = 0.5 by a sign "
        "test)."
    )
    reason = recommended([knn, far], Baseline("cat", 0.1, tuple([True, True] + [False] * 18)))["reason"]
    assert "is right on 12 of them, linear alone on 1: more than chance (p = 0.0034 by a sign test)." in reason
    assert reason.endswith("(0.100) is more than chance (p = 0.002 by a sign test).")


def test_of_methods_without_a_prompt_the_expected_one_is_recommended_unless_another_is_clearly_better() -> None:
    knn = answered(likeness_record("knn", 0), "++" + "+" * 18)
    linear = answered(likeness_record("linear", 0), "--" + "+" * 18)
    assert recommended([knn, linear])["request"]["method"] == "knn"
    assert recommended([knn, linear], prior="linear")["request"]["method"] == "linear"
    assert "The most accurate setting, knn, has 1.000" in recommended([knn, linear], prior="linear")["reason"]
    worse = answered(likeness_record("linear", 0), "-" * 5 + "+" * 15)
    assert recommended([knn, worse], prior="linear")["request"]["method"] == "knn"


def test_answers_are_compared_over_all_seeds() -> None:
    seeds = [answered(cell_record("random", 2, 0, seed), answers) for seed, answers in enumerate(("+-+-", "+--+"))]
    knn = answered(likeness_record("knn", 0), "++--")
    (row, other) = sorted(summarise([*seeds, knn]), key=lambda row: row["method"])
    assert compare(row, other, [*seeds, knn]) == Paired(2, 1, 0.0, 1.5)


def test_a_control_is_a_row_of_its_own_and_is_not_recommended() -> None:
    control = cell_record("random", 4, 0.99) | {"control": "text_only"}
    rows = summarise([control, cell_record("random", 4, 0.6)])
    assert [(row["control"], row["accuracy"]) for row in rows] == [(None, 0.6), ("text_only", 0.99)]
    assert recommended([control, cell_record("random", 4, 0.6)])["accuracy"] == 0.6
    assert "0.99" not in recommended([control, cell_record("random", 4, 0.6)])["reason"]


def test_controls_say_whether_the_answers_depend_on_what_they_take_away() -> None:
    whole = answered(cell_record("random", 4, 0), "+" * 18 + "-" * 2)
    blind = answered(cell_record("random", 4, 0), "+" * 5 + "-" * 15) | {"control": "text_only"}
    shuffled = answered(cell_record("random", 4, 0), "+" * 16 + "-" * 4) | {"control": "shuffled_labels"}
    cells = [whole, blind, shuffled]
    assert judge_controls(summarise(cells), cells) == [
        "in_context by random with k=4 has an accuracy of 0.800 with shuffled labels, otherwise of 0.900: the labels of "
        "the shots may not matter.",
        "in_context by random with k=4 has an accuracy of 0.250 without images, otherwise of 0.900: the images matter.",
    ]
    compared = answered(likeness_record("nearest_mean", 0), "+" * 18 + "-" * 2)
    features = answered(likeness_record("nearest_mean", 0), "+" * 9 + "-" * 11) | {"control": "encoder_features"}
    assert judge_controls(summarise([compared, features]), [compared, features]) == [
        "nearest_mean has an accuracy of 0.450 on the features of the encoder, otherwise of 0.900: the model's likeness "
        "is better."
    ]
    assert judge_controls(summarise(cells[1:]), cells[1:]) == []
    assert judge_controls(summarise([blind, alone(whole)]), cells) == []
