"""Learning curves of methods by likeness: their points, their gains, and what they say about more examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from model.likeness import Vectors
from server.fewshot.methods import METHODS, load_method
from server.fewshot.methods.likeness import Array, Fitted, Labelled, left_out_log_probabilities
from server.quality.learning_curve import learning_curve, outlook, report_curve
from server.quality.measures import Predictions


class Counting:
    """A method that is right once it has `needed` examples of each label, and remembers the numbers it was fitted to."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        self.counts: list[list[int]] = []

    def fit(self, labelled: Labelled) -> Fitted:
        self.counts.append(labelled.counts().tolist())
        is_right = labelled.counts().min() >= self.needed

        class Answers:
            def log_probabilities(self, queries: Vectors) -> Array:
                truth = np.round(queries[:, 0] * 2).astype(int)
                return np.log(np.eye(2)[truth if is_right else 1 - truth] + 0.1)

            def parameters(self) -> Mapping[str, Array]:
                raise NotImplementedError

        return Answers()

    def restore(self, parameters: Mapping[str, Array], labelled: Labelled) -> Fitted:
        raise NotImplementedError


def examples(*counts: int) -> Labelled:
    """Return vectors whose first value is half the label."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return Labelled(np.stack([labels / 2, np.arange(len(labels))], axis=1).astype(np.float32), labels, len(counts))


def test_each_point_has_about_half_of_the_examples_of_the_next() -> None:
    method = Counting(needed=2)
    points = learning_curve(method, examples(8, 8))
    assert [(point["examples_per_label"], point["accuracy"]) for point in points] == [(1, 0.0), (3, 1.0), (7, 1.0)]
    assert points[0]["gain"] is None
    assert points[1]["gain"]["mean"] == 1.0
    assert points[2]["gain"]["mean"] == 0.0
    assert {tuple(counts) for counts in method.counts} == {(1, 1), (3, 3), (7, 7)}


def test_a_label_with_few_examples_keeps_them_all() -> None:
    method = Counting(needed=1)
    learning_curve(method, examples(9, 2))
    assert {tuple(counts) for counts in method.counts} <= {(n, m) for n in (1, 2, 4, 8, 9) for m in (1, 2)}
    assert (8, 2) in {tuple(counts) for counts in method.counts}


@pytest.mark.parametrize("name", METHODS)
def test_the_last_point_is_the_leave_one_out_estimate(name: str) -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((15, 6)).astype(np.float32)
    labelled = Labelled(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.arange(15) % 3, 3)
    logs = left_out_log_probabilities(load_method(name), labelled)
    accuracy = Predictions(np.exp(logs), labelled.labels).is_correct.mean()
    assert learning_curve(load_method(name), labelled)[-1]["accuracy"] == pytest.approx(accuracy)


def points(before: float, last: float, error: float) -> list[dict[str, Any]]:
    return [
        {"examples_per_label": 4, "accuracy": before, "gain": None},
        {"examples_per_label": 8, "accuracy": last, "gain": {"mean": last - before, "standard_error": error}},
    ]


def test_the_last_doubling_says_whether_more_examples_will_help() -> None:
    assert outlook("knn", points(0.8, 0.9, 0.02)) == (
        "More examples will probably help: from 4 to 8 examples per label, knn went from 0.800 to 0.900 (+0.100 ± 0.020)."
    )
    assert (outlook("knn", points(0.9, 0.9, 0.005)) or "").startswith("More examples of the same kind will hardly help")
    assert (outlook("knn", points(0.88, 0.9, 0.02)) or "").startswith("It is not known whether more examples will help")
    assert outlook("knn", points(0.8, 0.9, 0.02)[:1]) is None
    assert (outlook("knn", points(0.9, 0.8999, 0.092)) or "").endswith("(+0.000 ± 0.092).")  # not -0.000


def test_the_curve_of_the_recommended_method_is_reported_or_else_that_of_the_best() -> None:
    cells = [
        {"method": "knn", "accuracy": 0.9, "learning_curve": points(0.8, 0.9, 0.02)},
        {"method": "linear", "accuracy": 0.8, "learning_curve": points(0.8, 0.8, 0.02)},
        {"method": "in_context", "accuracy": 1.0},
    ]
    assert (report_curve(cells, "linear") or {})["method"] == "linear"
    assert (report_curve(cells, "in_context") or {})["method"] == "knn"
    assert report_curve(cells[2:], None) is None
