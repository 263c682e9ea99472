"""A lock that rests: one piece of work at a time, and a rest before the next one."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from server.limits.resting_lock import REST, RestingLock

pytestmark = pytest.mark.anyio


async def test_the_first_work_begins_at_once_and_the_next_after_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now, rests = 1000.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now
        rests.append(seconds)
        now += seconds

    def work(seconds: float, error: Exception | None = None) -> float:
        nonlocal now
        now += seconds
        if error is not None:
            raise error
        return seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    lock = RestingLock(clock=lambda: now)
    assert await lock.run(work, 2.0) == 2.0
    now += 1.0  # a part of the rest is over
    await lock.run(work, 0.5)
    now += 100.0
    with pytest.raises(ValueError, match="a body that is refused"):
        await lock.run(work, 4.0, error=ValueError("a body that is refused has taken time, too"))
    await lock.run(work, 0.0)
    assert rests == [0.0, REST * 2.0 - 1.0, 0.0, REST * 4.0]


async def test_work_ends_before_the_next_begins() -> None:
    lock, running, most = RestingLock(), 0, 0

    def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.001)
        running -= 1

    await asyncio.gather(*(lock.run(work) for _ in range(5)))
    assert most == 1


async def test_work_of_a_cancelled_request_is_waited_for() -> None:
    lock, may_end, ended = RestingLock(), threading.Event(), []

    def work() -> None:
        may_end.wait(20)
        ended.append("first")

    first = asyncio.create_task(lock.run(work))
    await asyncio.sleep(0.05)
    first.cancel()
    second = asyncio.create_task(lock.run(ended.append, "second"))
    await asyncio.sleep(0.05)
    assert not first.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert ended == ["first", "second"]


async def test_the_event_loop_runs_during_the_work() -> None:
    lock, num_sleeps = RestingLock(), 0
    working = asyncio.create_task(lock.run(time.sleep, 0.5))
    while not working.done():
        num_sleeps += 1
        await asyncio.sleep(0.01)
    assert num_sleeps > 10
