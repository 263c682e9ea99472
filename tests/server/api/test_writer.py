"""Long answers of one client are written in turn with those of others, and one that is cancelled holds up none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import pytest

from server.api.writer import MAX_SHOWN, Writer
from server.limits.turns import client_in_turn

pytestmark = pytest.mark.anyio

LONG = MAX_SHOWN + 1

Result = TypeVar("Result")


def begin(writer: Writer, client: str, work: Callable[[], Result]) -> asyncio.Task[Result]:
    """Begin to write a long answer of a client."""
    client_in_turn.set(client)
    return asyncio.create_task(writer.write(LONG, work))


async def test_clients_take_turns() -> None:
    writer, may_begin, written = Writer(), threading.Event(), list[str]()
    names = ["a1", "a2", "a3", "a4", "b1", "b2", "c1"]

    def write(name: str) -> None:
        may_begin.wait()
        written.append(name)

    work = [partial(write, name) for name in names]
    tasks = [begin(writer, name[0], do) for name, do in zip(names, work, strict=True)]
    await asyncio.sleep(0)
    may_begin.set()
    await asyncio.gather(*tasks)
    assert written == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


async def test_work_on_few_tokens_is_done_at_once() -> None:
    writer, may_end = Writer(), threading.Event()
    long = begin(writer, "a", may_end.wait)
    await asyncio.sleep(0)
    assert await asyncio.wait_for(writer.write(MAX_SHOWN, lambda: 5), 1) == 5
    may_end.set()
    assert await long


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_an_answer_that_is_cancelled_holds_up_none(index: int) -> None:
    writer, may_end = Writer(), threading.Event()
    tasks = [begin(writer, client, may_end.wait) for client in "aab"]
    await asyncio.sleep(0)
    tasks[index].cancel()
    may_end.set()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [i == index for i in range(3)]
    assert await asyncio.wait_for(begin(writer, "c", lambda: 6), 20) == 6


async def test_cancelled_answers_do_not_cost_their_client_its_turn() -> None:
    writer, may_begin, written = Writer(), threading.Event(), list[str]()

    def write(name: str) -> None:
        may_begin.wait()
        written.append(name)

    names = ["x", "a1", "a2", "a3", "b1", "b2", "b3"]
    tasks = [begin(writer, name[0], partial(write, name)) for name in names]
    await asyncio.sleep(0)
    for task in tasks[1:3]:
        task.cancel()
    await asyncio.sleep(0)
    may_begin.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert written == ["x", "a3", "b1", "b2", "b3"]


async def test_work_that_fails_passes_the_turn_on() -> None:
    writer = Writer()
    with pytest.raises(ZeroDivisionError):
        await begin(writer, "a", lambda: 1 // 0)
    assert await asyncio.wait_for(begin(writer, "a", lambda: 6), 20) == 6
