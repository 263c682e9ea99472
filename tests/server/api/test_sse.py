"""Streams over plain ASGI send keep-alive comments, and a client that disconnects aborts its request."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pytest
from fastapi import FastAPI

from server.api.sse import _with_keep_alives, unless_disconnected
from server.errors import EngineDied
from server.limits.admission import Admission
from tests.server.conftest import image_part
from tests.server.fakes import FakeClient, eventually

pytestmark = pytest.mark.anyio


class Caller:
    """An HTTP client on the ASGI interface, which can disconnect."""

    def __init__(self, app: FastAPI, body: dict[str, Any], path: str = "/v1/completions") -> None:
        self.disconnected = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    @property
    def text(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


def hold_after(client: FakeClient, num_tokens: int) -> asyncio.Event:
    """Return an event; the answer has only `num_tokens` tokens until it is set."""
    opened = asyncio.Event()

    async def before(index: int) -> None:
        if index >= num_tokens:
            await opened.wait()

    client.before = before
    return opened


async def test_a_silent_stream_sends_comments(app: FastAPI, client: FakeClient) -> None:
    opened = hold_after(client, 0)
    caller = Caller(app, {"prompt": "x", "stream": True})
    await eventually(lambda: caller.text.count(b": keep-alive\n\n") >= 2)
    opened.set()
    await caller.task
    assert caller.text.endswith(b"data: [DONE]\n\n")
    assert caller.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_an_error_after_a_comment_is_an_event(app: FastAPI, client: FakeClient) -> None:
    gone = asyncio.Event()

    async def before(index: int) -> None:
        await gone.wait()
        raise EngineDied("the worker died")

    client.before = before
    caller = Caller(app, {"prompt": "x", "stream": True})
    await eventually(lambda: b": keep-alive\n\n" in caller.text)
    gone.set()
    await caller.task
    assert caller.sent[0]["status"] == 200
    *_, event, done, end = caller.text.split(b"\n\n")
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "engine_died"
    assert (done, end) == (b"data: [DONE]", b"")
    assert 'request_refused_total{code="engine_died"' in app.state.services.metrics.expose().decode()


async def test_each_piece_is_sent_immediately(app: FastAPI, client: FakeClient) -> None:
    opened = hold_after(client, 2)
    caller = Caller(app, {"prompt": "x", "stream": True})
    await eventually(lambda: caller.text.count(b"data: ") == 2)
    opened.set()
    await caller.task


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_a_client_that_disconnects_aborts_its_request(
    app: FastAPI, client: FakeClient, is_stream: bool, num_tokens: int
) -> None:
    hold_after(client, num_tokens)
    caller = Caller(app, {"prompt": "x", "stream": is_stream})
    admission: Admission = app.state.services.admission
    await eventually(lambda: admission.num_running == 1)
    caller.disconnected.set()
    await asyncio.wait_for(caller.task, 5)
    assert client.aborted == [client.requests[0].request_id]
    assert (admission.num_waiting, admission.num_running) == (0, 0)
    assert b"[DONE]" not in caller.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [image_part()]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image_part()]}]}),
    ],
)
async def test_a_client_that_disconnects_ends_the_reading_of_its_media(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def read_all(*_: object) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    monkeypatch.setattr(type(app.state.services.intake), "read_all", read_all)
    caller = Caller(app, body, path)
    await asyncio.wait_for(begun.wait(), 5)
    caller.disconnected.set()
    await asyncio.wait_for(caller.task, 5)
    assert ended.is_set()


async def unseen_errors(
    coroutine: Coroutine[Any, Any, Any], event: asyncio.Event | None = None
) -> list[dict[str, Any]]:
    """Run a coroutine, set the event, if any, and at once cancel it; return the errors that are logged as never seen."""
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0.01)
    if event is not None:
        event.set()
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    del task, coroutine
    gc.collect()
    return unseen


async def test_an_error_is_not_logged_as_unseen_if_the_client_leaves_at_the_same_time() -> None:
    failing = asyncio.Event()

    async def bodies() -> AsyncGenerator[Any, None]:
        await failing.wait()
        if failing.is_set():
            raise ValueError
        yield

    async def read() -> Any:
        return await anext(_with_keep_alives(bodies(), 60))

    assert not await unseen_errors(read(), failing)


async def test_work_that_fails_while_it_is_cancelled_is_not_logged_as_unseen() -> None:
    async def fail() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise EngineDied("the worker died")

    assert not await unseen_errors(unless_disconnected(asyncio.Queue[Any]().get, fail()))
