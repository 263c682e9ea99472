"""Which examples are chosen and in which order: whatever the set and the seed, none twice and as many as were asked."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from server.fewshot.selection import DEFAULT_ORDER, SIMILARITY, Selected, SelectionError, Similar, select
from server.schemas.fewshot import Order, Strategy
from server.store.records import Example

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
ORDERS: tuple[Order, ...] = get_args(Order)


def examples(labels: str) -> list[Example]:
    """One a letter, labelled with it."""
    return [Example(id=str(place), media=(), label=label) for place, label in enumerate(labels)]


def ids(chosen: list[Selected[Example]]) -> list[int]:
    return [int(one.example.id) for one in chosen]


@given(
    st.text("abc", max_size=12),
    st.integers(0, 12),
    st.sampled_from(STRATEGIES),
    st.sampled_from(ORDERS),
    st.integers(0, 9),
)
def test_as_many_as_were_asked_and_none_twice(labels: str, k: int, strategy: Strategy, order: Order, seed: int) -> None:
    assume(k <= len(labels))
    assume(order != "similar_last" or strategy in SIMILARITY)
    similar = [Similar(place, 1 - place / 10) for place in reversed(range(len(labels)))]
    found = select(strategy, examples(labels), k, seed=seed, order=order, similar=similar)
    assert len(set(ids(found))) == len(found) == k
    assert found == select(strategy, examples(labels), k, seed=seed, order=order, similar=similar)
    if order == "stored":
        assert ids(found) == sorted(ids(found))


@given(st.text("abcd", min_size=1, max_size=40), st.integers(0, 40), st.integers(0, 9))
def test_balanced_counts_differ_by_one_at_most_while_labels_last(labels: str, k: int, seed: int) -> None:
    assume(k <= len(labels))
    counts = Counter(one.example.label for one in select("balanced", examples(labels), k, seed=seed))
    lasting = [counts[label] for label in set(labels) if counts[label] < labels.count(label)]
    assert max(counts.values(), default=0) - min(lasting, default=max(counts.values(), default=0)) <= 1


def test_balanced_favours_no_label_where_there_is_room_for_few() -> None:
    chosen = Counter(select("balanced", examples("aabb"), 1, seed=seed)[0].example.label for seed in range(200))
    assert 70 < chosen["a"] < 130


def test_random_favours_no_place() -> None:
    first = Counter(ids(select("random", examples("aaaa"), 2, seed=seed))[0] for seed in range(400))
    assert all(70 < first[place] < 130 for place in range(4))


def test_the_order_of_another_seed_is_not_the_choice_of_another_seed() -> None:
    stored = select("random", examples("abcdef"), 3, seed=1, order="stored")
    shuffled = select("random", examples("abcdef"), 3, seed=1, order="shuffled")
    assert sorted(ids(shuffled)) == ids(stored)


def test_similar_ones_keep_their_scores_and_the_best_is_last() -> None:
    similar = [Similar(2, 0.9), Similar(0, 0.5), Similar(1, -0.1)]
    found = select("mixed", examples("abc"), 2, similar=similar)
    assert [(one.example.id, one.score) for one in found] == [("0", 0.5), ("2", 0.9)]
    assert select("first", examples("abc"), 1)[0].score is None


@pytest.mark.parametrize(
    ("strategy", "labels", "k", "order", "field"),
    [
        ("first", "abc", 4, None, "k"),
        ("balanced", "a b", 1, None, "strategy"),
        ("random", "abc", 2, "similar_last", "order"),
    ],
)
def test_what_cannot_be_chosen_names_its_field(
    strategy: Strategy, labels: str, k: int, order: Order | None, field: str
) -> None:
    with pytest.raises(SelectionError) as refusal:
        select(
            strategy,
            [Example(id=one.id, media=(), label=one.label.strip()) for one in examples(labels)],
            k,
            order=order,
        )
    assert refusal.value.field == field


def test_each_strategy_has_an_order_of_its_own() -> None:
    assert DEFAULT_ORDER.keys() == set(STRATEGIES)
    assert {DEFAULT_ORDER[strategy] for strategy in SIMILARITY} == {"similar_last"}


@pytest.mark.parametrize("strategy", ["first", "random", "balanced"])
@pytest.mark.parametrize("k", [1, 4, 5, 6, 9])
def test_what_is_left_out_leaves_the_rest_of_a_draw_as_it_is(strategy: Strategy, k: int) -> None:
    among = examples("aaaabbbbccccddddeeee")
    for seed in range(5):
        drawn = ids(select(strategy, among, k, seed=seed))
        for place in range(len(among)):
            found = ids(select(strategy, among, k, seed=seed, without={place}))
            assert len(found) == k
            assert place not in found
            assert [other for other in found if other in drawn] == [other for other in drawn if other != place]


def test_the_next_most_similar_stands_in_for_what_is_left_out() -> None:
    similar = [Similar(2, 0.9), Similar(0, 0.8), Similar(1, 0.1)]
    found = select("rices_image", examples("abc"), 2, similar=similar, without={2})
    assert [(one.example.id, one.score) for one in found] == [
        (examples("abc")[1].id, 0.1),
        (examples("abc")[0].id, 0.8),
    ]


def test_as_many_as_are_left_may_be_chosen() -> None:
    assert len(select("random", examples("abc"), 2, without={0})) == 2
    with pytest.raises(SelectionError):
        select("random", examples("abc"), 3, without={0})
