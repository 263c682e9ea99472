"""Tests of the split: a fifth of all names, independent of case, and no overlap of training and evaluation."""

from __future__ import annotations

from training.default.words import HELD_OUT_WORDS, TRAINED_WORDS, WORDS
from training.default_data.records import Record
from training.default_data.split import is_held_out, is_held_out_image, named_for_training, training_rows


def test_about_a_fifth_is_held_out_and_case_does_not_matter() -> None:
    names = [f"thing {n}" for n in range(2000)]
    assert 0.17 < sum(map(is_held_out, names)) / len(names) < 0.23
    assert all(is_held_out(name) == is_held_out(f" {name.upper()} ") for name in names)


def test_the_split_of_known_names_never_changes() -> None:
    # the shipped bridge was trained on this split
    names = (
        "dog face",
        "cat",
        "penguin",
        "banana",
        "rocket",
        "violin",
        "castle",
        "apple",
        "guitar",
        "frog",
        "tree",
        "bus",
    )
    assert [name for name in names if is_held_out(name)] == ["penguin", "banana", "violin", "castle", "tree"]


def test_about_one_in_twelve_images_is_held_out_for_naming() -> None:
    num_held_out = sum(is_held_out_image(f"images/noto/{n}.webp") for n in range(2400))
    assert 150 < num_held_out < 250


def test_words_are_distinct_and_either_trained_or_held_out() -> None:
    assert len(set(WORDS)) == len(WORDS) == len(TRAINED_WORDS) + len(HELD_OUT_WORDS)
    assert len(HELD_OUT_WORDS) > 200
    assert not set(TRAINED_WORDS) & set(HELD_OUT_WORDS)


def record(image: str, label: str, category: str = "fruit", trains: bool = True, digest: str = "") -> Record:
    return Record(
        image=f"images/{image}.webp",
        label=label,
        category=category,
        tags=(),
        source="s",
        licence="MIT",
        style="",
        domain="drawing",
        trains=trains,
        digest=digest or image,
    )


def test_training_rows_exclude_every_held_out_record() -> None:
    records = [
        record("a", "apple"),
        record("b", "banana"),  # held out
        record("fruitbanana01", ""),  # unlabelled, but its file name contains a held-out label
        record("fruitpear01", ""),
        record("c", "apple", category="tree"),  # a held-out category
        record("d", "apple", trains=False),
    ]
    assert not any(is_held_out_image(r.image) for r in records)
    assert training_rows(records) == [0, 3]


def test_training_rows_exclude_copies_of_held_out_images() -> None:
    held_out_image = next(f"s{n}" for n in range(99) if is_held_out_image(f"images/s{n}.webp"))
    records = [
        record("a", "apple", digest="1"),
        record("b", "banana", digest="2"),  # held out
        record("c", "guitar", digest="2"),
        record(held_out_image, "apple", digest="3"),  # held out for naming
        record("d", "apple", digest="3"),
        record("e", "", trains=False, digest="4"),  # for evaluation
        record("f", "", digest="4"),
        record("i", "apple", digest="1"),  # a copy of a training image
    ]
    assert named_for_training(records) == [0, 2, 4, 6, 7]
    assert training_rows(records) == [0, 7]
