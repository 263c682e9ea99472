"""A full queue refuses requests before reading them, clients share it, and every end of a request releases its ticket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.errors import ClientOverShare, Overloaded
from server.limits.admission import Admission
from server.limits.shared_limit import SharedLimit
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.wire import Generate
from tests.server.documented import CHECKED
from tests.server.fakes import AS_JSON, FakeClient, eventually

pytestmark = pytest.mark.anyio


@pytest.fixture
def admission(app: FastAPI) -> Admission:
    admission: Admission = app.state.services.admission
    return admission


class Gate:
    """Holds all requests before the engine admits them, until `opened` is set."""

    def __init__(self, client: FakeClient) -> None:
        self.opened = asyncio.Event()
        self._events = client._events
        client._events = self._hold  # type: ignore[method-assign]

    async def _hold(self, request: Generate) -> Any:
        await self.opened.wait()
        async for event in self._events(request):
            yield event


async def test_a_full_queue_refuses_a_request_without_reading_it(
    http: httpx.AsyncClient, client: FakeClient, admission: Admission
) -> None:
    gate = Gate(client)
    admission.queue = SharedLimit(4, 1, "requests that may wait")
    waiting = [asyncio.create_task(http.post("/v1/completions", json={"prompt": "x"})) for _ in range(4)]
    await eventually(lambda: admission.num_waiting == 4)
    refused = await http.post("/v1/completions", content=b"this is not even JSON")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert (await http.get("/health/ready")).json() == {"status": "overloaded"}
    gate.opened.set()
    assert [response.status_code for response in await asyncio.gather(*waiting)] == [200] * 4
    assert (admission.num_waiting, admission.num_running) == (0, 0)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_request_leaves_the_queue_when_the_engine_begins_it(
    http: httpx.AsyncClient, client: FakeClient, admission: Admission, is_stream: bool
) -> None:
    opened = asyncio.Event()

    async def before(index: int) -> None:
        await opened.wait()

    client.before = before
    posts = []
    for count in range(1, 7):
        posts.append(asyncio.create_task(http.post("/v1/completions", json={"prompt": "x", "stream": is_stream})))
        await eventually(lambda count=count: admission.num_running == count)  # type: ignore[misc]
    assert admission.num_waiting == 0
    opened.set()
    await asyncio.gather(*posts)
    await asyncio.wait_for(admission.wait_until_empty(), 5)


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": "x", "m": 2}, {}])
async def test_every_end_of_a_request_releases_its_ticket(
    http: httpx.AsyncClient, client: FakeClient, admission: Admission, body: dict[str, object]
) -> None:
    async def before(index: int) -> None:
        raise KeyError("a bug")

    await http.post("/v1/completions", json=body)
    client.before = before
    await http.post("/v1/completions", json=body)
    assert (admission.num_waiting, admission.num_running) == (0, 0)


def from_address(app: FastAPI, address: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", event_hooks=CHECKED)


async def test_a_client_over_its_share_is_refused_and_another_one_is_served(
    http: httpx.AsyncClient, app: FastAPI, client: FakeClient, admission: Admission
) -> None:
    gate = Gate(client)
    greedy = [asyncio.create_task(http.post("/v1/completions", json={"prompt": "x"})) for _ in range(3)]
    await eventually(lambda: admission.num_waiting == 3)
    refused = await http.post("/v1/completions", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "client_over_share")
    assert (refused.headers["x-should-retry"], int(refused.headers["retry-after"]) >= 1) == ("true", True)
    async with from_address(app, "10.0.0.9") as other:
        served = asyncio.create_task(other.post("/v1/completions", json={"prompt": "x"}))
        await eventually(lambda: admission.num_waiting == 4)
        gate.opened.set()
        assert (await served).status_code == 200
    assert [response.status_code for response in await asyncio.gather(*greedy)] == [200] * 3


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        ("10.0.0.1", "10.0.0.2", 200),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", 200),
        ("2001:db8::1", "2001:db8::2", 429),
        ("2001:db8::1", "2001:db8:0:1::1", 200),
        ("key_0001", "key_0002", 429),  # of a proxy that passes on what a client wrote
    ],
)
async def test_a_client_is_an_address_or_a_network_of_ipv6(
    app: FastAPI, client: FakeClient, admission: Admission, first: str, second: str, status: int
) -> None:
    gate = Gate(client)
    async with from_address(app, first) as first_client, from_address(app, second) as second_client:
        waiting = [asyncio.create_task(first_client.post("/v1/completions", json={"prompt": "x"})) for _ in range(3)]
        await eventually(lambda: admission.num_waiting == 3)
        last = asyncio.create_task(second_client.post("/v1/completions", json={"prompt": "x"}))
        await eventually(lambda: last.done() or admission.num_waiting == 4)
        gate.opened.set()
        assert (await last).status_code == status
        await asyncio.gather(*waiting)


async def test_a_request_takes_no_place_before_its_body_has_arrived(http: httpx.AsyncClient, app: FastAPI) -> None:
    admission, arrived = app.state.services.admission, asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        await arrived.wait()
        yield b'"x"}'

    slow = [asyncio.create_task(http.post("/v1/completions", headers=AS_JSON, content=body())) for _ in range(20)]
    await asyncio.sleep(0.05)
    assert admission.num_waiting == 0
    assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
    for task in slow:
        task.cancel()
    await asyncio.wait(slow)
    assert admission.bodies.used == 0


class TestHeldBodies:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_bodies_mb": 1, "max_body_mb": 4, "max_client_share": 0.5})

    async def test_bodies_in_flight_have_a_limit_that_clients_share(
        self, http: httpx.AsyncClient, app: FastAPI, admission: Admission
    ) -> None:
        arrived = asyncio.Event()

        async def body(size: int) -> AsyncIterator[bytes]:
            yield b" " * size
            await arrived.wait()
            yield b'{"prompt": "x"}'

        # a client without checks of the document, which cannot read a body of unknown length again
        sender = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
        held = asyncio.create_task(sender.post("/v1/completions", headers=AS_JSON, content=body(500_000)))
        await eventually(lambda: admission.bodies.used == 500_000)
        second = asyncio.create_task(http.post("/v1/completions", headers=AS_JSON, content=body(20_000)))
        await eventually(lambda: admission.bodies.used == 520_000)
        refused = await http.post("/v1/completions", content=b" " * 10_000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "client_over_share")
        assert refused.headers["connection"] == "close"
        async with from_address(app, "10.0.0.9") as other:
            assert (await other.post("/v1/completions", json={"prompt": "x"})).status_code == 200
            full = await other.post("/v1/completions", content=b" " * 600_000)
            assert (full.status_code, full.json()["error"]["code"]) == (503, "overloaded")
        second.cancel()
        await eventually(lambda: admission.bodies.used == 500_000)
        arrived.set()
        assert (await held).status_code == 200
        assert admission.bodies.used == 0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_retry_after_is_the_time_in_which_the_queue_empties() -> None:
    clock = Clock()
    admission = Admission(8, Metrics("tiny"), max_share=1, clock=clock)
    for _ in range(100):  # requests begin every two seconds
        with admission.ticket("a") as ticket:
            ticket.wait()
            clock.now += 2
            ticket.started()
        clock.now += 100  # an empty queue is no slow one
    tickets = [admission.ticket("a") for _ in range(8)]
    for ticket in tickets:
        ticket.wait()
    with pytest.raises(Overloaded) as error:
        admission.ticket("b").check()
    assert error.value.headers()["Retry-After"] == "16"


async def test_a_ticket_that_is_refused_holds_nothing() -> None:
    admission = Admission(2, Metrics("tiny"), max_share=0.5)
    admission.ticket("a").wait()
    with admission.ticket("a") as refused:
        refused.hold(10)
        with pytest.raises(ClientOverShare):
            refused.wait()
    assert (admission.num_waiting, admission.bodies.used) == (1, 0)
