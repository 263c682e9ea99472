"""Clients take turns at work, and work that is cancelled has no turn."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.api.services import Services
from server.api.writer import Writer
from server.limits.turns import REST, ThreadTurns, Turns, client_in_turn
from server.store.database import Database
from tests.server.fakes import served_model

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def held(turns: Turns) -> AsyncIterator[None]:
    client = await turns.take()
    try:
        yield
    finally:
        turns.give_back(client)


async def work(turns: Turns, client: str, name: str, done: list[str], seconds: float = 0.01) -> None:
    client_in_turn.set(client)
    async with held(turns):
        await asyncio.sleep(seconds)
        done.append(name)


def num_waiting(turns: Turns, client: str) -> int:
    client_in_turn.set(client)
    return turns.num_waiting()


async def begin(turns: Turns, done: list[str], *names: str) -> list[asyncio.Task[None]]:
    """Begin work whose names begin with the client's, in this order."""
    tasks = []
    for name in names:
        tasks.append(asyncio.create_task(work(turns, name[0], name, done)))
        await asyncio.sleep(0)
    return tasks


async def test_a_client_with_much_work_delays_another_by_one_piece() -> None:
    turns, done = ThreadTurns(1, "test"), list[str]()
    tasks = await begin(turns, done, "a1", "a2", "a3", "a4", "b1", "c1", "b2")
    await asyncio.gather(*tasks)
    assert done == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


async def test_as_many_pieces_run_as_there_are_turns() -> None:
    turns, running, most = ThreadTurns(2, "test"), 0, 0

    async def run(client: str) -> None:
        nonlocal running, most
        client_in_turn.set(client)
        async with held(turns):
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1

    await asyncio.gather(*(run(str(number % 3)) for number in range(20)))
    assert most == 2


async def test_long_texts_of_a_client_leave_a_tokenizer_thread_to_others() -> None:
    tokenize, may_end = served_model().tokenize, threading.Event()
    texts = []
    try:
        for _ in range(3):
            client_in_turn.set("long")
            texts.append(asyncio.create_task(tokenize(may_end.wait, 10)))
            await asyncio.sleep(0)
        client_in_turn.set("other")
        assert await asyncio.wait_for(tokenize(lambda: "tokens"), 5) == "tokens"
    finally:
        may_end.set()
    assert await asyncio.gather(*texts) == [True] * 3


async def test_a_client_leaves_turns_to_others_that_come_later() -> None:
    turns, done = Turns(3, max_of_client=2), list[str]()
    tasks = await begin(turns, done, "a1", "a2", "a3", "a4", "b1", "b2")
    assert [num_waiting(turns, client) for client in "ab"] == [2, 1]
    await asyncio.gather(*tasks)
    assert sorted(done[:3]) == ["a1", "a2", "b1"]
    assert [num_waiting(turns, client) for client in "ab"] == [0, 0]
    for client in ("x", "y", "z"):  # none of the turns is lost
        client_in_turn.set(client)
        assert await asyncio.wait_for(turns.take(), 1) == client


async def test_cancelled_work_has_no_turn() -> None:
    turns, done = ThreadTurns(1, "test"), list[str]()
    tasks = await begin(turns, done, "a1", "a2", "a3", "b1")
    tasks[1].cancel()
    tasks[3].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert done == ["a1", "a3"]
    await work(turns, "c", "c1", done)
    assert done[-1] == "c1"


async def test_a_turn_of_work_that_is_cancelled_at_that_moment_is_passed_on() -> None:
    turns, done = ThreadTurns(1, "test"), list[str]()
    async with held(turns):
        waiting, next_one = await begin(turns, done, "b1", "c1")
    waiting.cancel()  # it has its turn by now, and has not run yet
    await asyncio.gather(waiting, next_one, return_exceptions=True)
    assert done == ["c1"]


async def test_cancelled_work_does_not_cost_its_client_a_turn() -> None:
    turns, done = ThreadTurns(1, "test"), list[str]()
    async with held(turns):
        tasks = await begin(turns, done, "b1", "b2", "c1")
        tasks[0].cancel()  # it leaves after the turn has been passed on
    await asyncio.gather(*tasks, return_exceptions=True)
    assert done == ["b2", "c1"]


async def test_failed_work_passes_its_turn_on() -> None:
    turns = ThreadTurns(1, "test")
    with pytest.raises(ValueError, match="failed"):
        async with held(turns):
            raise ValueError("failed")
    async with asyncio.timeout(1), held(turns):
        pass


async def test_threads_serve_the_clients_of_requests_in_turn() -> None:
    run, may_begin, done = ThreadTurns(1, "test"), threading.Event(), list[str]()

    def work(name: str) -> None:
        may_begin.wait()
        done.append(name)

    tasks = []
    for name in ("a1", "a2", "a3", "b1"):
        client_in_turn.set(name[0])
        tasks.append(asyncio.create_task(run(work, name)))
        await asyncio.sleep(0)
    may_begin.set()
    await asyncio.gather(*tasks)
    assert done == ["a1", "a2", "b1", "a3"]


@pytest.mark.parametrize("item_seconds", [0.0, 10.0])
async def test_short_work_for_several_items_shares_a_turn(item_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    run, done, seconds = ThreadTurns(1, "test"), list[str](), count(0, item_seconds)
    monkeypatch.setattr("server.limits.turns.time", SimpleNamespace(monotonic=lambda: next(seconds)))

    def double(name: str) -> str:
        done.append(name)
        return 2 * name

    first = asyncio.create_task(run.each(double, ["a1", "a2", "a3"]))
    await asyncio.sleep(0)
    client_in_turn.set("b")
    assert await run.each(double, ["b1"]) == ["b1b1"]
    assert await first == ["a1a1", "a2a2", "a3a3"]
    assert done == (["a1", "b1", "a2", "a3"] if item_seconds else ["a1", "a2", "a3", "b1"])
    assert await run.each(double, []) == []


@pytest.mark.parametrize("fails", [False, True])
async def test_a_client_pauses_after_long_work_and_no_other_does(fails: bool) -> None:
    run = ThreadTurns(1, "test", rest=20.0)

    def work(seconds: float) -> float:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        if fails:
            raise ValueError("failed")
        return time.monotonic()

    client_in_turn.set("a")
    started = time.monotonic()
    with suppress(ValueError):
        await run(work, 0.02)
    paused = asyncio.create_task(run(time.monotonic))
    await asyncio.sleep(0)
    client_in_turn.set("b")
    other = await run(time.monotonic)
    assert await paused - started > 20 * 0.02
    assert other < await paused


async def test_there_is_no_pause_after_short_work(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ThreadTurns(1, "test", rest=1e6)
    monkeypatch.setattr("server.limits.turns.SHORT_SECONDS", 3600.0)
    for number in range(3):
        assert await asyncio.wait_for(run(str, number), 10) == str(number)


@pytest.mark.parametrize(("max_of_client", "factor"), [(1, 1), (2, 1), (8, 4)])
async def test_the_pause_is_longer_if_a_client_may_hold_many_turns(max_of_client: int, factor: int) -> None:
    turns = Turns(16, max_of_client, rest=3.0)
    loop, pauses = asyncio.get_running_loop(), list[float]()
    client = await turns.take()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "call_later", lambda pause, *rest: pauses.append(pause))
        turns.give_back(client, 0.01)
    assert pauses == [pytest.approx(factor * 0.03)]


def test_work_that_costs_no_step_of_the_engine_pauses(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/a.db")
    paused = (database._threads, Writer()._descriptions, default_of("exposition"), default_of("storage"))
    assert [turns._rest for turns in paused] == [REST] * 4
    assert (database._writers._rest, Writer()._answers._rest) == (0.0, 0.0)
    postgresql = Database("postgresql://a:b@c/d")
    assert postgresql._threads._rest > REST


def default_of(field: str) -> ThreadTurns:
    create: Any = Services.__dataclass_fields__[field].default_factory
    turns: ThreadTurns = create()
    return turns


async def test_a_function_that_has_begun_keeps_its_turn_when_its_request_leaves() -> None:
    run, begun, may_end = ThreadTurns(2, "test", max_of_client=1), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(60)

    client_in_turn.set("a")
    leaving = asyncio.create_task(run(work))
    await asyncio.to_thread(begun.wait, 60)
    leaving.cancel()
    await asyncio.wait([leaving])
    waiting = asyncio.create_task(run(str, 4))
    try:
        await asyncio.sleep(0.05)
        assert run.num_waiting() == 1
    finally:
        may_end.set()
    assert await asyncio.wait_for(waiting, 10) == "4"


async def test_failed_work_for_an_item_ends_all_items() -> None:
    run, done = ThreadTurns(1, "test"), list[int]()

    def fail(number: int) -> None:
        done.append(number)
        if number == 2:
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        await run.each(fail, [1, 2, 3])
    assert done == [1, 2]
    assert await run(str, 4) == "4"
