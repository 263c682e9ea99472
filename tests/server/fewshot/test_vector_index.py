"""The index against every score computed by hand, equals included; and when indexes are made and forgotten."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.fewshot.vector_index import RecentIndexes, VectorIndex, Vectors

pytestmark = pytest.mark.anyio


def unit(vectors: np.ndarray) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("num_vectors", "width"), [(1, 3), (7, 5), (100, 33), (1000, 1280)])
def test_search_is_brute_force(num_vectors: int, width: int) -> None:
    rng = np.random.default_rng(num_vectors)
    vectors, query = unit(rng.standard_normal((num_vectors, width))), unit(rng.standard_normal(width))
    scores = vectors.astype(np.float64) @ query
    for k in {1, 2, min(10, num_vectors), num_vectors, num_vectors + 5}:
        found = VectorIndex(vectors).search(query, k)
        assert [hit.index for hit in found] == np.argsort(-scores, kind="stable")[:k].tolist()
        assert [one.score for one in found] == pytest.approx(sorted(scores, reverse=True)[:k], abs=1e-6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 40), st.integers(0, 3))
@settings(deadline=None)
def test_of_equals_the_first_stored_comes_first(copies: list[int], k: int, asked: int) -> None:
    originals = unit(np.random.default_rng(3).standard_normal((4, 19)))
    found = VectorIndex(originals[copies]).search(originals[asked], k)
    order = np.argsort(-(originals @ originals[asked]), kind="stable").tolist()
    ranks = [order.index(copy) for copy in copies]
    assert [hit.index for hit in found] == sorted(range(len(copies)), key=lambda place: ranks[place])[:k]


def test_a_score_is_never_beyond_one_and_none_wanted_is_none_found() -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((50, 512)))
    index = VectorIndex(vectors)
    assert all(index.search(vector, 1)[0].score <= 1 for vector in vectors)
    assert index.search(vectors[0], 0) == []


class Maker:
    def __init__(self, size: int = 4) -> None:
        self.num_made = 0
        self.fails = False
        self.size = size

    async def __call__(self) -> Vectors:
        await asyncio.sleep(0)
        self.num_made += 1
        if self.fails:
            raise RuntimeError("told to")
        return np.eye(self.size, dtype=np.float32)


async def test_an_index_is_made_once_however_many_ask() -> None:
    indexes, maker = RecentIndexes(), Maker()
    found = await asyncio.gather(*(indexes.get("a", maker) for _ in range(5)))
    assert maker.num_made == 1
    assert len(set(map(id, found))) == 1


async def test_who_waits_behind_a_failure_tries_again() -> None:
    indexes, maker = RecentIndexes(), Maker()
    maker.fails = True
    results = await asyncio.gather(*(indexes.get("a", maker) for _ in range(2)), return_exceptions=True)
    assert maker.num_made == 2
    assert all(isinstance(result, RuntimeError) for result in results)
    maker.fails = False
    await indexes.get("a", maker)


async def test_what_was_not_asked_for_longest_is_forgotten_first() -> None:
    indexes, makers = RecentIndexes(max_bytes=2 * 4 * 4 * 4), {name: Maker() for name in "abc"}
    for name in "abacaab":
        await indexes.get(name, makers[name])
    assert {name: maker.num_made for name, maker in makers.items()} == {"a": 1, "b": 2, "c": 1}


async def test_one_that_is_too_large_is_kept_while_it_is_the_last() -> None:
    indexes, maker = RecentIndexes(max_bytes=1), Maker()
    await indexes.get("a", maker)
    await indexes.get("a", maker)
    assert maker.num_made == 1
