"""Selection returns exactly k distinct examples, in the requested order, for every set and seed."""

from __future__ import annotations

import random
from collections import Counter
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from server.errors import InvalidRequest
from server.fewshot.retrieval import SPACES
from server.fewshot.shots import DEFAULT_ORDER, Selected, select_examples
from server.fewshot.vector_index import Similar
from server.schemas.fewshot import Order, Strategy
from server.store.examples import Examples
from server.store.records import Example

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
ORDERS: tuple[Order, ...] = get_args(Order)


def examples(labels: str) -> Examples[Example]:
    """Return one example per letter, with the letter as its label; a space has none."""
    return Examples(Example(id=str(index), media=(), label=label.strip()) for index, label in enumerate(labels))


def ids(selected: list[Selected]) -> list[int]:
    return [int(item.example.id) for item in selected]


@given(
    st.text("abc", max_size=12),
    st.integers(0, 12),
    st.sampled_from(STRATEGIES),
    st.sampled_from(ORDERS),
    st.integers(0, 9),
)
def test_k_distinct_examples_are_selected(labels: str, k: int, strategy: Strategy, order: Order, seed: int) -> None:
    assume(k <= len(labels))
    assume(order != "similar_last" or strategy in SPACES)
    similar = [Similar(index, 1 - index / 10) for index in reversed(range(len(labels)))]
    selected = select_examples(strategy, examples(labels), k, seed=seed, order=order, similar=similar)
    assert len(set(ids(selected))) == len(selected) == k
    assert selected == select_examples(strategy, examples(labels), k, seed=seed, order=order, similar=similar)
    if order == "stored":
        assert ids(selected) == sorted(ids(selected))


@given(st.text("abcd", min_size=1, max_size=40), st.integers(0, 40), st.integers(0, 9))
def test_balanced_counts_differ_by_at_most_one_until_a_label_is_used_up(labels: str, k: int, seed: int) -> None:
    assume(k <= len(labels))
    counts = Counter(item.example.label for item in select_examples("balanced", examples(labels), k, seed=seed))
    unused = [counts[label] for label in set(labels) if counts[label] < labels.count(label)]
    assert max(counts.values(), default=0) - min(unused, default=max(counts.values(), default=0)) <= 1


def test_balanced_favours_no_label_if_k_is_less_than_the_number_of_labels() -> None:
    counts = Counter(
        select_examples("balanced", examples("aabb"), 1, seed=seed)[0].example.label for seed in range(200)
    )
    assert 70 < counts["a"] < 130


def test_random_favours_no_index() -> None:
    first = Counter(ids(select_examples("random", examples("aaaa"), 2, seed=seed))[0] for seed in range(400))
    assert all(70 < first[index] < 130 for index in range(4))


@pytest.mark.parametrize("strategy", ["first", "random", "balanced"])
def test_more_examples_begin_with_the_fewer_ones(strategy: Strategy) -> None:
    pool = examples("abcde" * 20)
    for seed in range(5):
        drawn = ids(select_examples(strategy, pool, len(pool), seed=seed))
        for k in (1, 4, 16, 20, 32, 99):
            assert ids(select_examples(strategy, pool, k, seed=seed)) == drawn[:k]


def test_a_shuffled_order_does_not_change_the_selection() -> None:
    stored = select_examples("random", examples("abcdef"), 3, seed=1, order="stored")
    shuffled = select_examples("random", examples("abcdef"), 3, seed=1, order="shuffled")
    assert sorted(ids(shuffled)) == ids(stored)


def test_similar_examples_have_their_scores_and_the_best_is_last() -> None:
    similar = [Similar(2, 0.9), Similar(0, 0.5), Similar(1, -0.1)]
    selected = select_examples("mixed", examples("abc"), 2, similar=similar)
    assert [(item.example.id, item.score) for item in selected] == [("0", 0.5), ("2", 0.9)]
    assert select_examples("first", examples("abc"), 1)[0].score is None


@pytest.mark.parametrize(
    ("strategy", "labels", "k", "order", "field"),
    [
        ("first", "abc", 4, None, "k"),
        ("balanced", "a b", 1, None, "strategy"),
        ("random", "abc", 2, "similar_last", "order"),
    ],
)
def test_an_error_names_the_field_of_an_impossible_selection(
    strategy: Strategy, labels: str, k: int, order: Order | None, field: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        select_examples(strategy, examples(labels), k, order=order)
    assert refusal.value.param == f"examples.{field}"


@pytest.mark.parametrize("size", [1, 5, 40])
def test_a_random_draw_is_that_of_the_standard_library(size: int) -> None:
    for seed in range(20):
        drawn = random.Random(seed).sample(range(size), size)
        assert ids(select_examples("random", examples("a" * size), size, seed=seed)) == drawn


def test_each_strategy_has_a_default_order() -> None:
    assert DEFAULT_ORDER.keys() == set(STRATEGIES)
    assert {DEFAULT_ORDER[strategy] for strategy in SPACES} == {"similar_last"}


@pytest.mark.parametrize("strategy", ["first", "random", "balanced"])
@pytest.mark.parametrize("k", [1, 4, 5, 6, 9])
def test_leaving_an_example_out_does_not_change_the_rest_of_a_draw(strategy: Strategy, k: int) -> None:
    pool = examples("aaaabbbbccccddddeeee")
    for seed in range(5):
        drawn = ids(select_examples(strategy, pool, k, seed=seed))
        for index in range(len(pool)):
            remaining = ids(select_examples(strategy, pool, k, seed=seed, without={index}))
            assert len(remaining) == k
            assert index not in remaining
            assert [other for other in remaining if other in drawn] == [other for other in drawn if other != index]


@given(st.text("abcd", min_size=1, max_size=20), st.integers(0, 20), st.integers(0, 9), st.sets(st.integers(0, 19)))
def test_balanced_counts_are_those_of_the_examples_that_are_left(
    labels: str, k: int, seed: int, without: set[int]
) -> None:
    """Without the query's own example, its label would else have fewer shots in an evaluation than in a request."""
    without = {index for index in without if index < len(labels)}
    left = Counter(label for index, label in enumerate(labels) if index not in without)
    assume(k <= left.total())
    selected = select_examples("balanced", examples(labels), k, seed=seed, without=without)
    counts = Counter(item.example.label for item in selected)
    assert without.isdisjoint(ids(selected))
    unused = [counts[label] for label in left if counts[label] < left[label]]
    assert max(counts.values(), default=0) - min(unused, default=max(counts.values(), default=0)) <= 1


def test_the_next_most_similar_example_replaces_one_that_is_left_out() -> None:
    similar = [Similar(2, 0.9), Similar(0, 0.8), Similar(1, 0.1)]
    selected = select_examples("rices_image", examples("abc"), 2, similar=similar, without={2})
    assert [(item.example.id, item.score) for item in selected] == [
        (examples("abc")[1].id, 0.1),
        (examples("abc")[0].id, 0.8),
    ]


def test_k_may_be_the_number_of_remaining_examples() -> None:
    assert len(select_examples("random", examples("abc"), 2, without={0})) == 2
    with pytest.raises(InvalidRequest):
        select_examples("random", examples("abc"), 3, without={0})
