"""Work in threads: what is not begun is not done for a request that has left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest

from server.limits.thread_work import run_to_end

pytestmark = pytest.mark.anyio


async def test_work_that_waits_for_a_thread_is_not_done_after_its_request_has_left() -> None:
    """A server that cannot start more threads has fewer of them than turns."""
    may_end, ended, done = threading.Event(), list[float](), list[str]()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(may_end.wait, 20)
        leaving = asyncio.create_task(run_to_end(threads, lambda: done.append("work"), ended.append))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        may_end.set()
    await asyncio.sleep(0)
    assert (done, ended) == ([], [0.0])


async def test_work_ends_with_its_seconds_before_its_result_is_returned() -> None:
    times, ended = iter([1.0, 3.5]), list[float]()
    with ThreadPoolExecutor(1) as threads:
        assert await run_to_end(threads, lambda: "result", ended.append, clock=lambda: next(times)) == "result"
    assert ended == [2.5]


async def test_work_of_an_executor_that_fails_after_queueing_it_is_not_done() -> None:
    """Python's own does, if the system refuses another thread."""
    queued, done, ended = list[Callable[[], object]](), list[str](), list[float]()

    def submit(work: Callable[[], object]) -> NoReturn:
        queued.append(work)
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError, match="new thread"):
        await run_to_end(cast(Executor, SimpleNamespace(submit=submit)), lambda: done.append("work"), ended.append)
    with pytest.raises(asyncio.CancelledError):
        queued[0]()
    assert (done, ended) == ([], [0.0])


async def test_work_that_no_thread_takes_has_ended() -> None:
    threads, ended = ThreadPoolExecutor(1), list[float]()
    threads.shutdown()
    with pytest.raises(RuntimeError):
        await run_to_end(threads, str, ended.append)
    assert ended == [0.0]
