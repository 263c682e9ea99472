"""Merges the items of several asynchronous generators into one, of which a limited number run at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import TypeVar

Item = TypeVar("Item")

END = object()


async def merge(generators: Iterable[AsyncGenerator[Item, None]], limit: int) -> AsyncGenerator[Item, None]:
    """Yield the items of all generators as they arrive; when one of `limit` running generators ends, the next begins.

    An exception of one of them is raised. Then, and if this generator is closed, all started generators are closed.
    """
    waiting, begun = iter(generators), list[AsyncGenerator[Item, None]]()
    running: dict[asyncio.Task[object], AsyncGenerator[Item, None]] = {}

    def run(generator: AsyncGenerator[Item, None]) -> None:
        running[asyncio.ensure_future(_next(generator))] = generator

    def begin_next() -> None:
        if (generator := next(waiting, None)) is not None:
            begun.append(generator)
            run(generator)

    try:
        for _ in range(limit):
            begin_next()
        while running:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in running if task.done()]:
                item = task.result()
                generator = running.pop(task)
                if item is END:
                    begin_next()
                else:
                    yield item  # type: ignore[misc]
                    run(generator)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for generator in begun:
            await generator.aclose()


async def _next(generator: AsyncGenerator[Item, None]) -> object:
    return await anext(generator, END)
