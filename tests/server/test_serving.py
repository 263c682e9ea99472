"""The API process is set up to share processors with the worker."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import uvicorn
from fastapi import FastAPI
from threadpoolctl import threadpool_info, threadpool_limits

from server.engine_client.spare import Spare
from server.serving import ACCEPTED_AT_ONCE, WAITING_CONNECTIONS, Server, serve
from server.settings import Settings, SettingsError

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
