"""The index against scores computed here, equal ones included; and when indexes are built and evicted."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.likeness import Vectors
from server.fewshot.recent import Recent
from server.fewshot.vector_index import VectorIndex

pytestmark = pytest.mark.anyio


def unit(vectors: np.ndarray) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("num_vectors", "width"), [(1, 3), (7, 5), (100, 33), (1000, 1280)])
def test_search_agrees_with_brute_force(num_vectors: int, width: int) -> None:
    rng = np.random.default_rng(num_vectors)
    vectors, query = unit(rng.standard_normal((num_vectors, width))), unit(rng.standard_normal(width))
    scores = vectors.astype(np.float64) @ query
    for k in {1, 2, min(10, num_vectors), num_vectors, num_vectors + 5}:
        similar = VectorIndex(vectors).search(query, k)
        assert [hit.index for hit in similar] == np.argsort(-scores, kind="stable")[:k].tolist()
        assert [hit.score for hit in similar] == pytest.approx(sorted(scores, reverse=True)[:k], abs=1e-6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 40), st.integers(0, 3))
@settings(deadline=None)
def test_equal_scores_are_in_the_order_of_the_set(copies: list[int], k: int, query: int) -> None:
    originals = unit(np.random.default_rng(3).standard_normal((4, 19)))
    similar = VectorIndex(originals[copies]).search(originals[query], k)
    order = np.argsort(-(originals @ originals[query]), kind="stable").tolist()
    ranks = [order.index(copy) for copy in copies]
    assert [hit.index for hit in similar] == sorted(range(len(copies)), key=lambda index: ranks[index])[:k]


def test_scores_are_at_most_one_and_k_zero_returns_nothing() -> None:
    """In float32, several of these products are beyond."""
    vectors = unit(np.random.default_rng(0).standard_normal((200, 2)))
    index = VectorIndex(vectors)
    products = [index.search(vector, len(vectors)) for vector in (*vectors, *-vectors)]
    scores = [hit.score for similar in products for hit in similar]
    assert (min(scores), max(scores)) == (-1, 1)
    assert index.search(vectors[0], 0) == []


class FakeVectors:
    """Counts how often vectors are computed, and fails on request."""

    def __init__(self, size: int = 4) -> None:
        self.num_calls = 0
        self.fails = False
        self.size = size

    async def __call__(self) -> VectorIndex:
        await asyncio.sleep(0)
        self.num_calls += 1
        if self.fails:
            raise RuntimeError("no vectors")
        return VectorIndex(np.eye(self.size, dtype=np.float32))


async def test_concurrent_requests_build_an_index_once() -> None:
    indexes, vectors = Recent[VectorIndex](), FakeVectors()
    results = await asyncio.gather(*(indexes.get("a", vectors) for _ in range(5)))
    assert vectors.num_calls == 1
    assert len(set(map(id, results))) == 1


async def test_the_next_request_tries_again_after_a_failure() -> None:
    indexes, vectors = Recent[VectorIndex](), FakeVectors()
    vectors.fails = True
    results = await asyncio.gather(*(indexes.get("a", vectors) for _ in range(2)), return_exceptions=True)
    assert vectors.num_calls == 2
    assert all(isinstance(result, RuntimeError) for result in results)
    vectors.fails = False
    await indexes.get("a", vectors)


async def test_the_least_recently_used_index_is_evicted_first() -> None:
    indexes, sources = Recent[VectorIndex](max_bytes=2 * 4 * 4 * 4), {name: FakeVectors() for name in "abc"}
    for name in "abacaab":
        await indexes.get(name, sources[name])
    assert {name: vectors.num_calls for name, vectors in sources.items()} == {"a": 1, "b": 2, "c": 1}


async def test_an_index_above_the_limit_stays_until_another_is_used() -> None:
    indexes, vectors = Recent[VectorIndex](max_bytes=1), FakeVectors()
    await indexes.get("a", vectors)
    await indexes.get("a", vectors)
    assert vectors.num_calls == 1
