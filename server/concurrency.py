"""Runs several coroutines, tasks or generators as one: all end together, also after a failure or a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")

END = object()


async def cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_concurrently(coroutines: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run coroutines concurrently; the first failure cancels the others and is raised, not an exception group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
    return [task.result() for task in tasks]


async def run_both(first: Coroutine[Any, Any, Result], second: Coroutine[Any, Any, Other]) -> tuple[Result, Other]:
    """Run two coroutines concurrently, as `run_concurrently` does."""
    results: list[Any] = await run_concurrently([first, second])
    return results[0], results[1]


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
        await cancel(running)
        for generator in begun:
            await generator.aclose()


async def _next(generator: AsyncGenerator[Item, None]) -> object:
    return await anext(generator, END)
