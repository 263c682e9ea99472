"""The cache of versions: a version is read once, however many threads need it at the same time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.store.examples import Examples
from server.store.records import Example
from server.store.version_cache import VersionCache

NUM_THREADS = 4


def test_threads_wait_for_the_one_that_reads_a_version() -> None:
    cache, read, may_end = VersionCache(100), list[str](), threading.Event()

    def slow() -> Examples[Example]:
        read.append("a")
        assert may_end.wait(10)
        return Examples[Example](())

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        pending = [threads.submit(cache.find, ("a", 1), slow) for _ in range(NUM_THREADS)]
        time.sleep(0.05)
        # no other version waits
        other = Examples[Example](())
        assert cache.find(("a", 2), lambda: other) is other
        may_end.set()
        results = [result.result(10) for result in pending]
    assert read == ["a"]
    assert all(result is results[0] for result in results)


def test_an_error_is_that_of_all_threads_that_wait_and_of_no_later_one() -> None:
    cache, read, may_end = VersionCache(100), list[str](), threading.Event()

    def lost() -> Examples[Example]:
        read.append("a")
        assert may_end.wait(10)
        raise ValueError("lost")

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        pending = [threads.submit(cache.find, ("a", 1), lost) for _ in range(NUM_THREADS)]
        time.sleep(0.05)
        may_end.set()
        for result in pending:
            with pytest.raises(ValueError, match="lost"):
                result.result(10)
    assert len(read) < NUM_THREADS  # a thread that began late on a busy machine has read it again
    assert len(cache.find(("a", 1), lambda: Examples[Example](()))) == 0
