"""The refusals of a client that asks again and again are held until their turn; nothing else waits for them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.limits.admission import Admission
from server.limits.pacing import FREE_REFUSALS, MAX_PAUSE, REFUSALS_PER_SECOND, Pacing
from server.limits.shared_limit import SharedLimit
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.fakes import Clock, FakeClient, eventually, served_model
from tests.server.limits.test_admission import Gate, from_address

pytestmark = pytest.mark.anyio
STEP = 1 / REFUSALS_PER_SECOND
Disconnected = Callable[[], Awaitable[None]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def paced(clock: Clock) -> Pacing:
    """Refusals of the client `a`, which have to wait for as long as any do."""
    paced = Pacing(8, clock)
    exhaust(paced, "a")
    return paced


def exhaust(paced: Pacing, client: str) -> None:
    while paced.pause(client) < MAX_PAUSE:
        pass


async def never() -> None:
    await asyncio.Event().wait()


@asynccontextmanager
async def held(paced: Pacing, disconnected: Disconnected = never) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(paced.hold("a", disconnected))
    await eventually(lambda: len(paced._pauses) > 0)
    yield task
    task.cancel()
    await asyncio.wait([task])


def test_the_first_refusals_are_immediate_and_further_ones_have_a_constant_rate(clock: Clock) -> None:
    paced = Pacing(8, clock)
    assert [paced.pause("a") for _ in range(FREE_REFUSALS)] == [0] * FREE_REFUSALS
    assert [paced.pause("a") for _ in range(3)] == pytest.approx([STEP, 2 * STEP, 3 * STEP])
    assert paced.pause("b") == 0
    clock.now += 1
    assert [paced.pause("a") for _ in range(REFUSALS_PER_SECOND)].count(0) == REFUSALS_PER_SECOND - 3


def test_a_client_that_is_silent_is_forgotten(clock: Clock) -> None:
    paced = Pacing(8, clock)
    for _ in range(2 * FREE_REFUSALS):
        paced.pause("a")
    clock.now += 2 * FREE_REFUSALS * STEP
    assert paced.pause("b") == 0
    assert list(paced._due) == ["b"]


async def test_a_refusal_is_held_for_its_pause(clock: Clock) -> None:
    paced = Pacing(8, clock)
    for _ in range(FREE_REFUSALS):
        await paced.hold("a", never)
    assert not paced._pauses
    held_one = asyncio.create_task(paced.hold("a", never))
    await asyncio.sleep(0)
    assert len(paced._pauses) == 1
    await asyncio.wait_for(held_one, 20)
    assert not paced._pauses


async def test_a_client_that_disconnects_ends_the_pause(paced: Pacing) -> None:
    left = asyncio.Event()

    async def disconnected() -> None:
        await left.wait()

    async with held(paced, disconnected) as task:
        assert not task.done()
        left.set()
        await asyncio.wait_for(task, MAX_PAUSE / 2)
    assert not paced._pauses


async def test_shutdown_ends_the_pause_and_begins_no_other(paced: Pacing) -> None:
    async with held(paced) as task:
        paced.close()
        await asyncio.wait_for(task, MAX_PAUSE / 2)
    await asyncio.wait_for(paced.hold("a", never), MAX_PAUSE / 2)


async def test_shutdown_may_come_when_a_pause_has_just_ended(paced: Pacing) -> None:
    async with held(paced) as task:
        (pause,) = paced._pauses
        pause.reschedule(0.0)
        await asyncio.sleep(0)
        assert (pause.expired(), len(paced._pauses)) == (True, 1)
        paced.close()
        await asyncio.wait_for(task, MAX_PAUSE / 2)


async def test_a_quarter_of_the_connections_may_hold_refusals(client: FakeClient, settings: Settings) -> None:
    few = settings.model_copy(update={"max_connections": 4})
    paced = create_app(client, served_model(), few, Metrics("tiny")).state.services.admission.pacing
    exhaust(paced, "a")
    async with held(paced):
        due = dict(paced._due)
        await asyncio.wait_for(paced.hold("a", never), MAX_PAUSE / 2)
        assert (len(paced._pauses), paced._due) == (1, due)


@pytest.fixture
def admission(app: FastAPI) -> Admission:
    admission: Admission = app.state.services.admission
    return admission


async def test_a_client_over_its_share_is_paced_and_holds_no_place(
    http: httpx.AsyncClient, app: FastAPI, client: FakeClient, admission: Admission
) -> None:
    gate = Gate(client)
    served = [asyncio.create_task(http.post("/v1/completions", json={"prompt": "x"})) for _ in range(3)]
    await eventually(lambda: admission.num_waiting == 3)
    exhaust(admission.pacing, "127.0.0.1")
    refused = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x"}))
    await eventually(lambda: len(admission.pacing._pauses) == 1)
    assert admission.num_waiting == 3
    async with from_address(app, "10.0.0.9") as other:
        other_served = asyncio.create_task(other.post("/v1/completions", json={"prompt": "x"}))
        await eventually(lambda: admission.num_waiting == 4)
        gate.opened.set()
        assert (await other_served).status_code == 200
    assert [response.status_code for response in await asyncio.gather(*served)] == [200] * 3
    await asyncio.wait_for(admission.wait_until_empty(), MAX_PAUSE / 2)
    assert not refused.done()
    admission.close()
    assert (await refused).json()["error"]["code"] == "client_over_share"


async def test_a_full_server_refuses_without_a_pause(
    http: httpx.AsyncClient, client: FakeClient, admission: Admission
) -> None:
    gate = Gate(client)
    admission.queue = SharedLimit(1, 1, "requests that may wait")
    served = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x"}))
    await eventually(lambda: admission.num_waiting == 1)
    admission.pacing._due["127.0.0.1"] = math.inf
    refused = await http.post("/v1/completions", json={"prompt": "x"})
    assert refused.json()["error"]["code"] == "overloaded"
    gate.opened.set()
    await served
