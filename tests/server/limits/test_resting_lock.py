"""A lock that rests: one use at a time, and a rest before the next one."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from server.limits.resting_lock import REST, RestingLock

pytestmark = pytest.mark.anyio


async def test_the_first_use_begins_at_once_and_the_next_after_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now, rests = 1000.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now
        rests.append(seconds)
        now += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    lock = RestingLock(clock=lambda: now)
    async with lock.hold():
        now += 2.0
    now += 1.0  # a part of the rest is over
    async with lock.hold():
        now += 0.5
    now += 100.0
    with suppress(RuntimeError):
        async with lock.hold():
            now += 4.0
            raise RuntimeError("a body that is refused has held the event loop, too")
    async with lock.hold():
        pass
    assert rests == [0.0, REST * 2.0 - 1.0, 0.0, REST * 4.0]


async def test_one_use_ends_before_the_next_begins() -> None:
    lock, running, most = RestingLock(), 0, 0

    async def work() -> None:
        nonlocal running, most
        async with lock.hold():
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1

    await asyncio.gather(*(work() for _ in range(5)))
    assert most == 1
