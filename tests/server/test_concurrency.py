"""Merged generators: their items in the order of their making, a limit, exceptions, and what is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from server.concurrency import merge

pytestmark = pytest.mark.anyio


class Source:
    """Yields `name` and a number, with a pause before each; raises after `fails_after` items."""

    running = 0
    most_running = 0

    def __init__(self, name: str, count: int, pause: float = 0.0, fails_after: int | None = None) -> None:
        self.name, self.count, self.pause, self.fails_after = name, count, pause, fails_after
        self.is_closed = False

    async def items(self) -> AsyncGenerator[str, None]:
        Source.running += 1
        Source.most_running = max(Source.most_running, Source.running)
        try:
            for number in range(self.count):
                if number == self.fails_after:
                    raise LookupError(self.name)
                await asyncio.sleep(self.pause)
                yield f"{self.name}{number}"
        finally:
            await asyncio.sleep(0)  # as a generator that aborts a request
            Source.running -= 1
            self.is_closed = True


@pytest.fixture(autouse=True)
def counts() -> None:
    Source.running = Source.most_running = 0


async def collected(sources: list[Source], limit: int) -> list[str]:
    async with aclosing(merge((source.items() for source in sources), limit)) as items:
        return [item async for item in items]


async def test_all_items_come_each_in_the_order_of_its_source() -> None:
    sources = [Source(name, count) for name, count in (("a", 5), ("b", 0), ("c", 1), ("d", 3))]
    items = await collected(sources, 2)
    assert sorted(items) == ["a0", "a1", "a2", "a3", "a4", "c0", "d0", "d1", "d2"]
    for name in "acd":
        items_of_name = [item for item in items if item[0] == name]
        assert items_of_name == sorted(items_of_name)


async def test_a_fast_source_does_not_wait_for_a_slow_one() -> None:
    items = await collected([Source("slow", 1, 0.2), Source("fast", 3, 0.01)], 2)
    assert items == ["fast0", "fast1", "fast2", "slow0"]


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (3, 3), (20, 10)])
async def test_a_limited_number_run_at_once(limit: int, most: int) -> None:
    assert len(await collected([Source(str(n), 2, 0.001) for n in range(10)], limit)) == 20
    assert Source.most_running == most


async def test_an_exception_ends_all() -> None:
    sources = [Source("a", 5, fails_after=1), Source("b", 100, 0.01), Source("c", 1)]
    with pytest.raises(LookupError, match="a"):
        await collected(sources, 2)
    assert [source.is_closed for source in sources] == [True, True, False]  # the last one has not begun
    assert Source.running == 0


async def test_closing_ends_all() -> None:
    sources = [Source("a", 5, 0.001), Source("b", 100, 10.0)]
    async with aclosing(merge((source.items() for source in sources), 2)) as items:
        assert await anext(items) == "a0"
    assert [source.is_closed for source in sources] == [True, True]


async def test_cancelling_ends_all() -> None:
    sources = [Source("a", 5, 10.0), Source("b", 5, 10.0)]
    task = asyncio.create_task(collected(sources, 2))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [source.is_closed for source in sources] == [True, True]


async def test_nothing_is_merged_to_nothing() -> None:
    assert await collected([], 3) == []
