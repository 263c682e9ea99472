"""Suggestions of what to label next: typical pictures of uncertain regions, each unlike those before it."""

from __future__ import annotations

import numpy as np
import pytest

from model.likeness import Vectors
from server.quality.suggestion import label_margins, nearest_similarities, suggest


def at(*degrees: float) -> Vectors:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


NONE = at()[:0]


def order(pool: Vectors, labelled: Vectors, count: int, probabilities: np.ndarray | None = None) -> list[int]:
    names = [] if probabilities is None else ["x", "y", "z"][: probabilities.shape[1]]
    return [entry.index for entry in suggest(pool, labelled, probabilities, names, count)]


def test_without_labels_the_middle_of_each_group_comes_first_and_the_larger_group_before() -> None:
    pool = at(0, 10, 20, 30, 40, 170, 180, 190)
    assert order(pool, NONE, 2) == [2, 6]


def test_a_region_with_labelled_examples_waits() -> None:
    pool = at(0, 10, 20, 30, 40, 170, 180, 190)
    assert order(pool, at(20), 1) == [6]


def test_of_two_regions_the_uncertain_one_comes_first() -> None:
    pool, labelled = at(80, 90, 100, 260, 270, 280), at(0)
    sure, unsure = [0.99, 0.01], [0.5, 0.5]
    assert order(pool, labelled, 1, np.array([sure] * 3 + [unsure] * 3)) == [4]
    assert order(pool, labelled, 1, np.array([unsure] * 3 + [sure] * 3)) == [1]


def test_reasons_are_those_of_the_moment_of_the_suggestion() -> None:
    pool, labelled = at(0, 60, 62), at(30)
    probabilities = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.4, 0.3, 0.3]])
    first, second, third = suggest(pool, labelled, probabilities, ["x", "y", "z"], 9)
    assert first.similarity == pytest.approx(np.cos(np.radians(30)), abs=1e-6)
    assert {first.index, second.index, third.index} == {0, 1, 2}
    assert third.similarity == pytest.approx(np.cos(np.radians(2)), abs=1e-6)
    assert first.gain >= second.gain >= third.gain >= 0
    assert first.margin == pytest.approx(probabilities[first.index, 0] - probabilities[first.index, 1])
    assert [label.label for label in first.labels] == ["x", "y"]
    assert [label.probability for label in first.labels] == pytest.approx(probabilities[first.index, :2].tolist())


def test_without_two_labels_nothing_is_weighed() -> None:
    (entry,) = suggest(at(0), NONE, None, [], 3)
    assert (entry.similarity, entry.margin, entry.labels) == (None, None, [])
    assert entry.gain == pytest.approx(1)


def test_the_whole_pool_is_ordered_without_repetition() -> None:
    vectors = np.random.default_rng(0).standard_normal((30, 5))
    pool = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    assert sorted(order(pool, pool[:3], 100)) == list(range(30))
    assert order(pool, pool[:3], 4) == order(pool, pool[:3], 100)[:4]


def test_margins_and_nearest_similarities() -> None:
    assert label_margins(np.array([[0.2, 0.5, 0.3], [0.9, 0.0, 0.1]])) == pytest.approx([0.2, 0.8])
    assert nearest_similarities(at(0, 90), at(60, 30)) == pytest.approx([np.cos(np.pi / 6)] * 2, abs=1e-6)
    assert nearest_similarities(at(0), NONE).tolist() == [-np.inf]
