"""The API process is set up to share processors with the worker."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from threadpoolctl import threadpool_info, threadpool_limits

from server import serving, start
from server.engine_client.spare import Spare
from server.serving import ACCEPTED_AT_ONCE, WAITING_CONNECTIONS, Server, drain, listener, serve
from server.settings import Settings, SettingsError
from server.signals import ending_signals
from tests.server.fakes import AS_JSON, FakeClient, eventually

pytestmark = pytest.mark.anyio


async def test_products_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    with threadpool_limits(limits=2, user_api="blas"):
        with pytest.raises(SettingsError):
            await serve(Settings(model="/nowhere"), Spare("no:worker", 1.0))
        threads = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
    assert set(threads) == {1}


@pytest.fixture
def _unfrozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_unfrozen")
async def test_collections_do_not_visit_what_the_start_has_made(app: FastAPI) -> None:
    """Visiting it takes so long that streams stop meanwhile."""
    server = Server(uvicorn.Config(app, port=0, log_config=None))
    server.should_exit = True  # at once after the start
    await server.serve()
    is_permanent = all(visited is not app for visited in gc.get_objects())
    await server.shutdown()
    assert is_permanent


@pytest.mark.usefixtures("_unfrozen")
async def test_a_burst_of_connections_waits_without_loss(app: FastAPI) -> None:
    """A connection that the operating system drops is repeated by its client only after a second."""
    server = Server(uvicorn.Config(app, port=0, log_config=None, backlog=ACCEPTED_AT_ONCE))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    (listening,) = [listening for listener in server.servers for listening in listener.sockets]
    with ExitStack() as connections:
        for _ in range(WAITING_CONNECTIONS):  # the event loop accepts none of them meanwhile
            connections.enter_context(socket.create_connection(listening.getsockname(), timeout=0.5))
    server.should_exit = True
    await running


@pytest.mark.parametrize(("trusted", "address"), [(None, "127.0.0.1"), ("127.0.0.1", "9.9.9.9")])
async def test_only_a_proxy_that_the_operator_names_says_for_whom_a_request_is(
    trusted: str | None, address: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if trusted is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)

    async def show_client(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(scope["client"][0])(scope, receive, send)

    config = listener(show_client, settings)
    config.load()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(config.loaded_app), base_url="http://a") as http:
        assert (await http.get("/", headers={"X-Forwarded-For": "9.9.9.9"})).text == address


async def test_a_request_whose_body_still_arrives_is_finished(
    app: FastAPI, http: httpx.AsyncClient, client: FakeClient
) -> None:
    admission, may_arrive = app.state.services.admission, asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        await may_arrive.wait()
        yield b'"x"}'

    sender = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
    arriving = asyncio.create_task(sender.post("/v1/completions", headers=AS_JSON, content=body()))
    await eventually(lambda: admission.bodies.used > 0)
    draining = asyncio.create_task(drain(admission, client, 10))
    await eventually(lambda: admission.is_closed)
    for method, path, status in (("GET", "/v1/models", 503), ("GET", "/metrics", 200), ("GET", "/health/live", 200)):
        assert (await http.request(method, path)).status_code == status
    assert not draining.done()
    may_arrive.set()
    assert (await arriving).status_code == 200
    await asyncio.wait_for(draining, 5)


@pytest.mark.usefixtures("_unfrozen")
async def test_a_request_that_does_not_arrive_in_time_gets_the_error_of_the_shutdown(
    app: FastAPI, client: FakeClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "FINAL_EVENTS_SECONDS", 0.1)
    monkeypatch.setattr(client, "fail_all", lambda error: None)
    server = Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    running = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    (listening,) = [listening for listener in server.servers for listening in listener.sockets]
    reader, writer = await asyncio.open_connection(*listening.getsockname())
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head + b'Content-Length: 100\r\n\r\n{"prompt"')
    admission = app.state.services.admission
    await eventually(lambda: admission.bodies.used > 0)
    await drain(admission, client, 0.1)
    server.should_exit = True
    answer = await asyncio.wait_for(reader.read(), 10)
    await asyncio.wait_for(running, 10)
    writer.close()
    answer_head, _, answer_body = answer.partition(b"\r\n\r\n")
    assert answer_head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(answer_body)["error"]["code"] == "shutting_down"
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    assert signal.SIGHUP in ending_signals()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ending_signals() == [signal.SIGTERM, signal.SIGINT]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_garbage_is_collected_again_after_the_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    collects: list[bool] = []
    monkeypatch.setattr(start, "import_module", lambda name: collects.append(gc.isenabled()))
    start._import_serving()
    gc.unfreeze()
    assert collects == [False]
    assert gc.isenabled()
