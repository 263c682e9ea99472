"""Tests of the simulated caches: what is dropped first, and what a request finds in the three caches of a replica."""

from __future__ import annotations

from dataclasses import replace

from bench.fleet.caches import Caches, CacheSizes, Misses, PartialLru
from tests.bench.fleet.fleets import SHAPE

SIZES = CacheSizes(pages=18, host=0, tokens=200)


def test_the_least_recently_used_entry_is_dropped_first() -> None:
    cache = PartialLru(3)
    for key in (1, 2, 3, 1, 4):
        cache.touch(key, 1)
    assert [cache.present(key) for key in (1, 2, 3, 4)] == [1, 0, 1, 1]


def test_an_entry_loses_no_more_parts_than_others_need() -> None:
    cache = PartialLru(10)
    cache.touch(1, 8)
    cache.touch(2, 5)
    assert [cache.present(key) for key in (1, 2)] == [5, 5]
    assert cache.touch(1, 8) == 3
    assert [cache.present(key) for key in (1, 2)] == [8, 2]


def test_an_entry_that_is_too_large_is_kept_in_part() -> None:
    cache = PartialLru(4)
    assert [cache.touch(1, 6) for _ in range(2)] == [6, 2]
    assert cache.size == 4


def test_a_new_set_is_encoded_and_a_cached_text_needs_no_pages() -> None:
    caches = Caches(SIZES, SHAPE)
    assert caches.use(0, query=0) == Misses(tokens=80, encoded=8, absent=8)
    assert caches.use(0, query=1) == Misses()
    for query in range(2, 18):  # their pages drop those of the set
        caches.pages.touch(-1 - query, 1)
    assert caches.use(0, query=20) == Misses(absent=8)


def test_pages_come_from_host_memory_without_encoding() -> None:
    caches = Caches(replace(SIZES, host=100, tokens=80), SHAPE)
    caches.use(0, query=0)
    caches.use(1, query=1)
    caches.use(2, query=2)
    assert caches.use(0, query=3) == Misses(tokens=80, rebuilt=8)
