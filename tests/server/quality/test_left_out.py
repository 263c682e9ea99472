"""Exact leave-one-out against the method itself, fitted anew without each example."""

from __future__ import annotations

import numpy as np
import pytest

from server.fewshot.methods import load_method
from server.fewshot.methods.likeness import SCALE, Array, Labelled, log_softmax
from server.quality import left_out
from server.quality.left_out import blocks, confident_labels, label_sums, leave_each_out, self_confidence

WIDTH = 12
# the label 3 has a single example, and the label 2 has two
LABELS = np.array([0, 1, 0, 2, 1, 1, 3, 0, 2, 0, 1])


@pytest.fixture(autouse=True, params=[2**20, 40])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_out, "BLOCK", request.param)


@pytest.fixture
def labelled() -> Labelled:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((4, WIDTH))[LABELS] + 1.5 * rng.standard_normal((len(LABELS), WIDTH))
    return Labelled((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), LABELS, 4)


def left_out_logs(labelled: Labelled, *indices: int) -> Array:
    """Return the log-probabilities [N, C] of all examples by the nearest mean without some of them."""
    is_left_out = np.isin(np.arange(len(labelled.labels)), indices)
    logs = load_method("nearest_mean").fit(labelled.without(is_left_out)).log_probabilities(labelled.vectors)
    return log_softmax(logs * left_out.SCALE / SCALE)


def test_blocks_cover_all_rows_within_the_limit() -> None:
    rows = list(blocks(11, 11))
    assert np.concatenate([np.arange(11)[block] for block in rows]).tolist() == list(range(11))
    assert all((block.stop - block.start) * 11 <= left_out.BLOCK for block in rows)
    assert list(blocks(0, 5)) == []
    assert len(list(blocks(2, 2**30))) == 2


def test_each_example_is_scored_by_the_others(labelled: Labelled) -> None:
    scores = leave_each_out(label_sums(labelled))
    for index, label in enumerate(LABELS):
        if label == 3:
            assert scores.truth[index] == -np.inf
            continue
        logs = left_out_logs(labelled, index)[index]
        assert scores.truth[index] - scores.total[index] == pytest.approx(logs[label], abs=1e-4)
        ranked = sorted((other for other in range(4) if other != label), key=lambda other: -logs[other])
        assert scores.other[index] == ranked[0]
        assert scores.best[index] - scores.total[index] == pytest.approx(logs[ranked[0]], abs=1e-4)
        assert scores.is_right[index] == (logs.argmax() == label)


def test_a_confident_label_is_as_probable_as_for_its_own_examples(labelled: Labelled) -> None:
    sums = label_sums(labelled)
    scores = leave_each_out(sums)
    thresholds = self_confidence(sums, scores)
    probabilities = np.stack(
        [np.exp(left_out_logs(labelled, index)[index]) for index in range(len(LABELS)) if index != 6]
    )
    judged = np.delete(LABELS, 6)
    self_confidences = probabilities[np.arange(len(judged)), judged]
    assert thresholds[:3] == pytest.approx([self_confidences[judged == label].mean() for label in range(3)], abs=1e-4)
    assert thresholds[3] == pytest.approx(self_confidences.mean(), abs=1e-4)
    confident, margins = confident_labels(sums, scores)
    assert (confident[6], margins[6]) == (3, 0)
    expected = []
    for row, label in zip(probabilities, judged, strict=True):
        candidates = [other for other in range(4) if row[other] >= thresholds[other] and row[other] >= row[label]]
        expected.append(max(candidates, key=lambda other: row[other], default=label))
    assert np.delete(confident, 6).tolist() == expected
    assert (np.array(expected) != judged).any()
    assert np.delete(margins, 6) == pytest.approx(
        [row[new] - row[old] for row, new, old in zip(probabilities, expected, judged, strict=True)], abs=1e-4
    )


@pytest.mark.parametrize("labels", [[0], [0, 1], [0, 0], [0, 0, 0], [0, 0, 1]])
def test_sets_that_hardly_have_others_are_scored_without_warnings(labels: list[int]) -> None:
    vectors = np.eye(len(labels), WIDTH, dtype=np.float32)
    labelled = Labelled(vectors, np.array(labels), max(labels) + 1)
    sums = label_sums(labelled)
    confident, margins = confident_labels(sums, leave_each_out(sums))
    assert len(confident) == len(labels)
    assert np.isfinite(margins).all()


def test_a_vector_of_zeros_is_like_nothing() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 0]], np.float32)
    labelled = Labelled(vectors, np.array([0, 0, 1, 1, 1]), 2)
    scores = leave_each_out(label_sums(labelled))
    assert (scores.truth[4], scores.best[4]) == (0, 0)


def test_labels_that_fit_equally_well_are_not_confused_by_rounding() -> None:
    """One image has each of two labels twice."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((20, 400))
    for vector in vectors / np.linalg.norm(vectors, axis=1, keepdims=True):
        labelled = Labelled(np.stack([vector.astype(np.float32)] * 4), np.array([0, 0, 1, 1]), 2)
        sums = label_sums(labelled)
        confident, margins = confident_labels(sums, leave_each_out(sums))
        assert (confident.tolist(), margins.tolist()) == ([0, 0, 1, 1], [0, 0, 0, 0])
