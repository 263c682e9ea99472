"""The split: a fifth by name, whatever the case, and no trained word or image that the evaluation uses."""

from __future__ import annotations

from training.default.words import HELD_OUT_WORDS, TRAINED_WORDS, WORDS
from training.default_data.records import Record
from training.default_data.split import held_out, held_out_image, training_rows


def test_about_a_fifth_is_held_out_and_case_does_not_matter() -> None:
    names = [f"thing {n}" for n in range(2000)]
    assert 0.17 < sum(map(held_out, names)) / len(names) < 0.23
    assert all(held_out(name) == held_out(f" {name.upper()} ") for name in names)


def test_the_split_of_known_names_never_changes() -> None:
    # a shipped bridge was trained on one side of it
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
    assert [name for name in names if held_out(name)] == ["penguin", "banana", "violin", "castle", "tree"]


def test_images_kept_for_naming_are_few() -> None:
    kept = sum(held_out_image(f"images/noto/{n}.webp") for n in range(2400))
    assert 150 < kept < 250


def test_words_are_all_different_and_on_one_side_each() -> None:
    assert len(set(WORDS)) == len(WORDS) == len(TRAINED_WORDS) + len(HELD_OUT_WORDS)
    assert len(HELD_OUT_WORDS) > 200
    assert not set(TRAINED_WORDS) & set(HELD_OUT_WORDS)


def record(image: str, label: str, category: str = "fruit", trains: bool = True) -> Record:
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
    )


def test_what_trains_is_decided_once() -> None:
    records = [
        record("a", "apple"),
        record("b", "banana"),  # held out
        record("fruitbanana01", ""),  # unlabelled, but its file says what it shows
        record("fruitpear01", ""),
        record("c", "apple", category="tree"),  # a held-out kind
        record("d", "apple", trains=False),
    ]
    assert not any(held_out_image(one.image) for one in records)
    assert training_rows(records) == [0, 3]
