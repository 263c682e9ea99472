"""Findings on sets whose faults are known: wrong labels, harmful examples, duplicates, contradictions, confusions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model.likeness import Vectors
from server.quality import left_out
from server.quality.diagnostics import Diagnosing, Diagnosis, read_labelled
from server.store.records import Example

WIDTH = 64


def unit(vectors: np.ndarray) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def clouds(num_labels: int, per_label: int, noise: float, seed: int) -> tuple[list[Example], Vectors]:
    """Return labelled examples in shuffled order, with vectors around a centre per label."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_labels), per_label))
    vectors = rng.standard_normal((num_labels, WIDTH))[labels] + noise * rng.standard_normal((len(labels), WIDTH))
    examples = [
        Example(id=f"e{index}", media=(f"img_{index}",), label=f"label {label}") for index, label in enumerate(labels)
    ]
    return examples, unit(vectors)


def relabel(examples: list[Example], share: float, seed: int) -> dict[str, str]:
    """Give a share of the examples another label, in place, and return their right labels by id."""
    rng = np.random.default_rng(seed)
    labels = sorted({example.label for example in examples})
    right = {}
    for index in rng.choice(len(examples), round(share * len(examples)), replace=False):
        example = examples[index]
        right[example.id] = example.label
        examples[index] = replace(example, label=str(rng.choice([label for label in labels if label != example.label])))
    return right


def run(examples: list[Example], vectors: Vectors) -> Diagnosis:
    diagnosing = Diagnosing(read_labelled(examples), vectors)
    for piece in diagnosing.pieces:
        diagnosing.compare(piece)
    return diagnosing.diagnosis()


@pytest.mark.parametrize("per_label", [10, 20])
def test_a_tenth_of_wrong_labels_is_found(per_label: int) -> None:
    num_hits = num_named = num_wrong = num_right_names = 0
    for seed in range(12):
        examples, vectors = clouds(5, per_label, 1.6, seed)
        right = relabel(examples, 0.1, seed)
        named = {entry.id: entry.looks_like for entry in run(examples, vectors).mislabelled}
        hits = named.keys() & right.keys()
        num_hits, num_named, num_wrong = num_hits + len(hits), num_named + len(named), num_wrong + len(right)
        num_right_names += sum(named[example_id] == right[example_id] for example_id in hits)
    assert num_hits / num_wrong >= 0.8
    assert num_hits / num_named >= 0.7
    assert num_right_names / num_hits >= 0.9


def test_a_set_without_faults_has_no_findings() -> None:
    diagnosis = run(*clouds(4, 8, 0.3, 0))
    assert (diagnosis.num_judged, diagnosis.num_right, diagnosis.num_examples) == (32, 32, 32)
    for entries in (diagnosis.mislabelled, diagnosis.harmful, diagnosis.conflicting, diagnosis.confused):
        assert entries == []
    assert diagnosis.single == ()


def test_the_most_certain_wrong_label_comes_first_with_its_score() -> None:
    examples, vectors = clouds(3, 12, 1.0, 1)
    relabel(examples, 0.15, 1)
    entries = run(examples, vectors).mislabelled
    scores = [entry.score for entry in entries]
    assert len(scores) > 2
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score <= 1 for score in scores)
    labels = {example.id: example.label for example in examples}
    assert all(entry.label == labels[entry.id] != entry.looks_like for entry in entries)


def test_examples_that_make_others_wrong_are_harmful() -> None:
    """A wrong label is next to examples of another label; a right one among its own is not."""
    num_hits = num_wrong = 0
    for seed in range(6):
        examples, vectors = clouds(3, 12, 0.6, seed)
        right = relabel(examples, 0.1, seed)
        entries = run(examples, vectors).harmful
        named, values = {entry.id for entry in entries}, [entry.value for entry in entries]
        assert named <= right.keys()
        assert values == sorted(values)
        assert all(value < 0 for value in values)
        num_hits, num_wrong = num_hits + len(named), num_wrong + len(right)
    assert num_hits / num_wrong >= 0.5


def copies(*groups: tuple[str, float, str]) -> tuple[list[Example], Vectors]:
    """Return an example per (media, angle in degrees, label)."""
    examples = [Example(id=f"e{index}", media=(media,), label=label) for index, (media, _, label) in enumerate(groups)]
    angles = np.radians([angle for _, angle, _ in groups])
    return examples, unit(np.stack([np.cos(angles), np.sin(angles)], 1))


@pytest.mark.parametrize("block", [2**20, 8])
def test_near_duplicates_of_a_label_repeat_the_first_that_is_kept(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(left_out, "BLOCK", block)
    examples, vectors = copies(
        ("img_a", 0, "x"),
        ("img_b", 15, "x"),
        ("img_c", 30, "x"),
        ("img_a", 0, "x"),
        ("img_d", 180, "y"),
        ("img_e", 90, "y"),
    )
    diagnosis = run(examples, vectors)
    entries = {entry.id: entry for entry in diagnosis.redundant}
    # e2 is near e1, which is not kept, and not near e0
    assert {key: entry.duplicate_of for key, entry in entries.items()} == {"e1": "e0", "e3": "e0"}
    assert (entries["e3"].same_media, entries["e1"].same_media) == (True, False)
    assert entries["e1"].similarity == pytest.approx(np.cos(np.radians(15)), abs=1e-6)
    assert entries["e1"].similarity >= diagnosis.duplicate_similarity > np.cos(np.radians(30))
    assert list(entries) == ["e3", "e1"]


def test_the_similarity_of_duplicates_depends_on_that_of_all_examples() -> None:
    examples, vectors = clouds(4, 10, 1.0, 2)
    products = (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)]
    assert run(examples, vectors).duplicate_similarity == pytest.approx(1 - 0.1 * (1 - products.mean()), abs=1e-6)
    # as with an encoder whose vectors are all alike
    alike = unit(vectors + np.eye(1, WIDTH) * 3)
    diagnosis = run(examples, alike)
    assert (alike @ alike.T).mean() > 0.89
    assert diagnosis.duplicate_similarity > 0.98
    assert (diagnosis.redundant, diagnosis.conflicting) == ([], [])
    same = np.tile(vectors[:1], (len(vectors), 1))
    assert run(examples, same).duplicate_similarity == 0.999
    assert run(examples[:1], vectors[:1]).duplicate_similarity == 0.9


def test_near_duplicates_with_different_labels_are_in_conflict() -> None:
    examples, vectors = copies(
        ("img_a", 0, "x"), ("img_a", 0, "y"), ("img_b", 4, "z"), ("img_c", 90, "z"), ("img_d", 180, "x")
    )
    diagnosis = run(examples, vectors)
    assert diagnosis.redundant == []
    first, second = diagnosis.conflicting
    assert (first.ids, first.labels, first.same_media) == (["e0", "e1"], ["x", "y"], True)
    assert first.similarity == pytest.approx(1)
    assert (second.ids, second.labels, second.same_media) == (["e0", "e2"], ["x", "z"], False)


def test_labels_that_are_taken_for_each_other_are_counted_by_direction() -> None:
    examples, vectors = copies(
        *(
            (f"img_{index}", angle, label)
            for index, (angle, label) in enumerate(
                [
                    (0, "x"),
                    (2, "x"),
                    (4, "x"),
                    (60, "x"),
                    (64, "x"),
                    (58, "y"),
                    (62, "y"),
                    (66, "y"),
                    (3, "y"),
                    (180, "z"),
                    (178, "z"),
                ]
            )
        )
    )
    (entry,) = run(examples, vectors).confused
    assert entry.labels == ["x", "y"]
    assert entry.count == sum(entry.counts)
    assert entry.counts == [2, 1]


def test_a_label_with_one_example_is_named_and_not_judged() -> None:
    examples, vectors = copies(("img_a", 0, "x"), ("img_b", 20, "x"), ("img_c", 90, "y"))
    diagnosis = run(examples, vectors)
    assert diagnosis.single == ("y",)
    assert (diagnosis.num_judged, diagnosis.num_right) == (2, 2)
    assert diagnosis.labels == ("x", "y")


def test_examples_without_an_answer_or_media_are_counted_and_a_text_is_an_answer() -> None:
    labelled = read_labelled(
        [
            Example(id="a", media=("img_a",), label="x"),
            Example(id="b", media=("img_b",), text="y"),
            Example(id="c", media=("img_c",)),
            Example(id="d", media=(), label="x"),
        ]
    )
    assert [example.id for example in labelled.examples] == ["a", "b"]
    assert (labelled.names, labelled.indices.tolist()) == (("x", "y"), [0, 1])
    assert (labelled.num_unlabelled, labelled.num_without_media) == (1, 1)


def test_the_memory_of_a_diagnosis_has_the_texts_that_are_labels() -> None:
    examples, vectors = clouds(2, 4, 0.1, seed=0)
    long = {
        example.id: replace(example, label="", text=f"\U0001f600 {example.id} {'x' * 10_000}") for example in examples
    }
    assert run([*long.values()], vectors).num_bytes > len(examples) * 40_000
    assert run(examples, vectors).num_bytes < 10_000
