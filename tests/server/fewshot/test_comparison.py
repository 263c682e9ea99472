"""`auto` without an evaluation: the method that the model's prior expects, unless another one is clearly better."""

from __future__ import annotations

import numpy as np
import pytest

from model.prior import Prior
from server.fewshot.comparison import ComparedExamples
from server.fewshot.methods.likeness import Labelled

LINEAR = Prior({1: "nearest_mean", 3: "linear"})


def labelled(groups: dict[int, list[tuple[float, float]]], noise: float = 0.02) -> Labelled:
    """Return the vectors of each label near its points, of length one."""
    rng = np.random.default_rng(0)
    points = np.array([point for members in groups.values() for point in members])
    vectors = np.concatenate([points, np.zeros((len(points), 6))], axis=1) + noise * rng.standard_normal(
        (len(points), 8)
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Labelled(vectors.astype(np.float32), np.repeat([*groups], [*map(len, groups.values())]), len(groups))


def test_methods_that_are_equally_accurate_leave_the_expected_one() -> None:
    easy = {0: [(1.0, 0.0)] * 4, 1: [(0.0, 1.0)] * 4}
    assert ComparedExamples(labelled(easy), LINEAR).choose_method() == "linear"
    assert ComparedExamples(labelled(easy), Prior({1: "knn"})).choose_method() == "knn"


def test_the_expected_method_depends_on_the_examples_per_label() -> None:
    few = {0: [(1.0, 0.0)] * 2, 1: [(0.0, 1.0)] * 2}
    assert ComparedExamples(labelled(few), LINEAR).choose_method() == "nearest_mean"


def test_a_label_with_a_single_example_leaves_the_expected_method() -> None:
    single = {0: [(1.0, 0.0)], 1: [(0.0, 1.0)] * 6}
    assert ComparedExamples(labelled(single), LINEAR).choose_method() == "linear"
    assert ComparedExamples(labelled(single)).choose_method() == "nearest_mean"


@pytest.mark.parametrize("per_group", [8, 16])
def test_a_method_that_is_clearly_better_takes_its_place(per_group: int) -> None:
    """The mean of a label with two opposite groups is near neither of them."""
    groups = {0: [(1.0, 0.0), (-1.0, 0.0)] * per_group, 1: [(0.0, 1.0), (0.0, -1.0)] * per_group}
    assert ComparedExamples(labelled(groups)).choose_method() == "knn"
