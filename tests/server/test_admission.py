"""A full queue refuses requests before reading them, and every end of a request releases its ticket."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.admission import Admission
from server.wire import Generate
from tests.server.fakes import FakeClient, eventually

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
    await asyncio.wait_for(admission.wait_until_idle(), 5)


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
