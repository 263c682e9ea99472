"""Examples know their answers, labels and media."""

from __future__ import annotations

import pytest

from server.store.examples import Examples
from server.store.records import Example, NewExample
from server.store.support_sets import SupportSets

CAT = Example("a", ("red",), label="cat")
DOG = Example("b", ("blue",), label="dog", text="a dog")
TEXT = Example("c", (), text="cat")
BARE = Example("d", ("green",))


def test_examples_are_grouped_by_label_or_else_text_in_order_of_appearance() -> None:
    by_answer = Examples([DOG, CAT, BARE, TEXT]).by_answer
    assert list(by_answer.items()) == [("dog", [0]), ("cat", [1, 3]), ("", [2])]


@pytest.mark.parametrize(
    ("examples", "expected"), [([], False), ([CAT, DOG], True), ([CAT, TEXT], False), ([BARE], False)]
)
def test_examples_are_labelled_if_all_of_them_have_labels(examples: list[Example], expected: bool) -> None:
    assert Examples(examples).are_labelled == expected


def test_the_first_examples_with_and_without_media_are_found() -> None:
    examples = Examples([CAT, TEXT, BARE])
    assert (examples.first_with_media, examples.first_without_media) == (CAT, TEXT)
    assert Examples([TEXT]).first_with_media is None
    assert Examples([CAT]).first_without_media is None


@pytest.mark.anyio
async def test_the_groups_of_a_version_are_computed_once_for_all_requests(support_sets: SupportSets) -> None:
    await support_sets.create("s", [NewExample(id="a", media=(), label="cat")])
    first, second = [(await support_sets.get_version("s")).examples for _ in range(2)]
    assert list(first.by_answer) == ["cat"]
    assert first.by_answer is second.by_answer
