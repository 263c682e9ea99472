"""A lock that rests: one piece of work at a time, and a rest before the next one."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.limits import resting_lock
from server.limits.resting_lock import REST_OF_ALL, RestingLock
from server.limits.turns import REST, client_in_turn

pytestmark = pytest.mark.anyio


class Time:
    """A clock that sleep and work move on."""

    def __init__(self) -> None:
        self.now, self.rests = 1000.0, list[float]()
        self._sleep, self._thread = asyncio.sleep, threading.get_ident()

    async def sleep(self, seconds: float) -> None:
        if threading.get_ident() != self._thread:  # of a server that other tests of this process have started
            await self._sleep(seconds)
            return
        self.rests += [seconds] if seconds else []
        self.now += seconds

    def work(self, seconds: float, error: Exception | None = None) -> float:
        self.now += seconds
        if error is not None:
            raise error
        return seconds


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Time:
    fake = Time()
    monkeypatch.setattr(asyncio, "sleep", fake.sleep)
    return fake


async def test_the_first_work_begins_at_once_and_the_next_after_a_rest(fake: Time) -> None:
    lock = RestingLock(clock=lambda: fake.now)
    assert await lock.run(fake.work, 2.0) == 2.0
    fake.now += 1.0  # a part of the rest is over
    await lock.run(fake.work, 0.5)
    fake.now += 100.0
    with pytest.raises(ValueError, match="a body that is refused"):
        await lock.run(fake.work, 4.0, error=ValueError("a body that is refused has taken time, too"))
    await lock.run(fake.work, 0.0)
    assert fake.rests == [REST * 2.0 - 1.0, REST * 4.0]


async def test_all_clients_together_have_half_of_the_time(fake: Time) -> None:
    lock = RestingLock(clock=lambda: fake.now)
    for client in range(20):  # none waits for the longer pause of another
        client_in_turn.set(f"10.0.0.{client}")
        await lock.run(fake.work, 2.0)
    assert fake.rests == [REST_OF_ALL * 2.0] * 19
    assert REST_OF_ALL >= 1.0


async def test_work_waits_for_no_thread_of_other_work() -> None:
    """A busy pool would hold up the bodies of all clients, and the time would count as work."""
    may_end = threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    other = asyncio.create_task(asyncio.to_thread(may_end.wait, 20))
    try:
        await asyncio.sleep(0)
        name = await asyncio.wait_for(RestingLock().run(lambda: threading.current_thread().name), timeout=10)
        assert name.startswith("parsing")
    finally:
        may_end.set()
        assert await other


def lock_with_threads() -> RestingLock:
    """Return a lock whose pieces of work could run at the same time."""
    lock = RestingLock()
    lock._thread = ThreadPoolExecutor(2)
    return lock


async def test_work_ends_before_the_next_begins() -> None:
    lock, running, most = lock_with_threads(), 0, 0

    def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.001)
        running -= 1

    await asyncio.gather(*(lock.run(work) for _ in range(5)))
    assert most == 1


async def test_work_of_a_cancelled_request_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a client could disconnect to have its bodies parsed at the same time, and without pauses."""
    monkeypatch.setattr(resting_lock, "REST", 0.0)
    lock, may_end, ended = lock_with_threads(), threading.Event(), list[str]()

    def work() -> None:
        may_end.wait(20)
        ended.append("first")

    first = asyncio.create_task(lock.run(work))
    await asyncio.sleep(0.05)
    for _ in range(2):
        first.cancel()
        await asyncio.sleep(0)
    second = asyncio.create_task(lock.run(ended.append, "second"))
    client_in_turn.set("another")
    third = asyncio.create_task(lock.run(ended.append, "third"))
    await asyncio.sleep(0.05)
    assert (ended, second.done(), third.done()) == ([], False, False)
    may_end.set()
    await asyncio.gather(second, third)
    assert sorted(ended[1:]) == ["second", "third"]
    assert ended[0] == "first"


async def test_work_that_waits_is_not_done_after_its_request_was_cancelled() -> None:
    lock, may_end, ended = lock_with_threads(), threading.Event(), list[str]()
    first = asyncio.create_task(lock.run(may_end.wait, 20))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(lock.run(ended.append, "second"))
    await asyncio.sleep(0.05)
    second.cancel()
    may_end.set()
    await asyncio.gather(first, second, return_exceptions=True)
    assert ended == []


async def test_the_event_loop_runs_during_the_work() -> None:
    lock, num_sleeps = RestingLock(), 0
    working = asyncio.create_task(lock.run(time.sleep, 0.5))
    while not working.done():
        num_sleeps += 1
        await asyncio.sleep(0.01)
    assert num_sleeps > 10
