"""Serves the HTTP application of a model until a signal, and drains running requests.

After SIGTERM, SIGINT or SIGHUP, /health/ready returns 503 and new requests are refused. Running requests have
`shutdown_timeout` seconds to finish, and then end with an error event. A second signal ends them at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import DBAPIError
from starlette.types import ASGIApp
from threadpoolctl import threadpool_limits

from server.app import create_app
from server.engine_client.client import EngineClient, WorkerClient
from server.engine_client.spare import Spare
from server.errors import DatabaseUnavailable, ShuttingDown
from server.limits.admission import Admission
from server.limits.connections import Connection, permit_open_files
from server.media.pool import DecodePool
from server.served_model import ServedModel
from server.settings import Settings, SettingsError, opentelemetry_variables, trusted_proxies
from server.signals import ending_signals
from server.store.database import Database
from server.store.schema import DatabaseError
from server.telemetry.metrics import Metrics
from server.telemetry.variables import check_variables

# time to write the last error events after all requests were aborted
FINAL_EVENTS_SECONDS = 2
# The event loop accepts up to this number of connections at once, before any request continues.
ACCEPTED_AT_ONCE = 8
# The operating system holds up to this number until they are accepted. A client beyond it tries again only after 1 s; but
# if a client connects without end, all others wait behind this number of its connections.
WAITING_CONNECTIONS = 256
# Seconds for which a thread keeps the interpreter while others wait. With Python's default of 5 ms, the event loop would
# wait longer for each busy thread of the database or the tokenizer.
SWITCH_SECONDS = 0.0005

logger = logging.getLogger("server")


class Server(uvicorn.Server):
    """A uvicorn server whose initial objects are not garbage-collected, and whose signals `_watch` handles.

    Uvicorn's own signal handler would stop listening before a probe reads 503.
    """

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in self.servers:
            for listening in listener.sockets:
                _hold_connections(listening.fileno())
        # all objects so far are permanent: a full garbage collection that visits them would block the event loop for long
        gc.collect()
        gc.freeze()


def _hold_connections(listening: int) -> None:
    """Let a listening socket hold many connections: asyncio gives both numbers the value of `backlog`."""
    with socket.socket(fileno=os.dup(listening)) as listener:
        listener.listen(WAITING_CONNECTIONS)


async def serve(settings: Settings, spare: Spare) -> int:
    """Serve until a signal, and return the exit status; the first worker is taken from `spare`.

    Raises `SettingsError` for settings that cannot work, also if only the worker detects it.
    """
    set_up_process()
    app, engine = await assemble(settings, spare)
    permit_open_files(settings)
    server = Server(listener(app, settings))
    watcher = asyncio.create_task(_watch(server, engine, app.state.services.admission, settings.shutdown_timeout))
    await server.serve()
    if not server.started:
        watcher.cancel()
        return 1
    return await watcher


def listener(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """Return how uvicorn listens and reads requests."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=partial(Connection, settings=settings),  # type: ignore[arg-type]  # it is called like a class
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        log_config=None,
        access_log=False,
        # by default, uvicorn lets any program of this machine say for whom its requests are
        forwarded_allow_ips=trusted_proxies(),
        timeout_graceful_shutdown=FINAL_EVENTS_SECONDS,
    )


def set_up_process() -> None:
    """Configure the process: how long a thread keeps the interpreter, and how many threads multiply matrices."""
    sys.setswitchinterval(SWITCH_SECONDS)
    # Methods of classification multiply small matrices. Several threads would wait for each other: next to a busy worker,
    # that takes fifty times the processor time.
    threadpool_limits(limits=1, user_api="blas")


async def assemble(
    settings: Settings, spare: Spare, catalog: Mapping[str, ServedModel] | None = None
) -> tuple[FastAPI, WorkerClient]:
    """Return the application of a model, with its database open, and the engine that its lifespan starts.

    `catalog` has the models at the address of this server by name, if it is not the only one. Raises `SettingsError`.
    """
    model = ServedModel.load(settings)
    metrics = Metrics(model.name)
    decoder = DecodePool(model.config.vision, settings)
    engine = WorkerClient(settings, decoder, metrics, spare)
    app = create_app(engine, model, settings, metrics, decoder, catalog)
    if settings.otlp_endpoint is not None:
        _trace_requests(app, settings.otlp_endpoint, model.name)
    await open_database(app.state.services.database)
    return app, engine


def _trace_requests(app: FastAPI, endpoint: str, model_name: str) -> None:
    """Trace requests; imports packages that only tracing needs.

    Raises `SettingsError` if they are not installed, or refuse a value of OpenTelemetry's own variables.
    """
    try:
        check_variables(opentelemetry_variables())
        # the SDK reads some of its variables when it is imported
        tracing = import_module("server.telemetry.tracing")
        tracing.trace_requests(app, endpoint, model_name)
    except ModuleNotFoundError as error:
        message = f"otlp_endpoint: {error.name} is not installed: install the extra otel"
        raise SettingsError(message) from None
    except ValueError as error:
        raise SettingsError(
            f"otlp_endpoint: a variable of OpenTelemetry has a value that cannot work: {error}"
        ) from None


async def open_database(database: Database) -> None:
    """Lock and check the database before the model is loaded.

    Raises `SettingsError` if another server uses it, if it is unavailable or cannot be used, or of another version.
    """
    database.lock()
    try:
        await database.prepare()
    except BaseException as error:
        database.close()
        if isinstance(error, DatabaseUnavailable):
            raise DatabaseError(f"database: {error.message}") from None
        if isinstance(error, DBAPIError):  # such as a missing permission
            reason, _, _ = str(error.orig).partition("\n")
            raise DatabaseError(f"database: {reason}") from None
        raise


async def _watch(server: Server, engine: WorkerClient, admission: Admission, timeout: float) -> int:
    """Wait for a signal or a failed start of the worker, then drain the requests and stop the server.

    Raises `SettingsError` if the worker has refused the settings.
    """
    signals = _signals()
    loaded = asyncio.ensure_future(engine.loaded())
    first_signal = asyncio.ensure_future(signals.get())
    await asyncio.wait({loaded, first_signal}, return_when=asyncio.FIRST_COMPLETED)
    is_broken = loaded.done() and loaded.exception() is not None
    if is_broken:
        first_signal.cancel()
    else:
        await first_signal
        loaded.cancel()
        second_signal = asyncio.ensure_future(signals.get())
        await drain(admission, engine, timeout, second_signal)
        second_signal.cancel()
    server.should_exit = True
    if is_broken and isinstance(error := loaded.exception(), SettingsError):
        raise error
    return int(is_broken)


def _signals() -> asyncio.Queue[int]:
    received: asyncio.Queue[int] = asyncio.Queue()
    for number in ending_signals():
        asyncio.get_running_loop().add_signal_handler(number, received.put_nowait, number)
    return received


async def drain(
    admission: Admission, engine: EngineClient, timeout: float, hurry: asyncio.Future[int] | None = None
) -> None:
    """Refuse new requests, and let running ones finish for `timeout` seconds or until `hurry`; then they fail."""
    admission.close()
    logger.info("shutting down", extra={"waiting": admission.num_waiting, "running": admission.num_running})
    idle = asyncio.ensure_future(admission.wait_until_empty())
    ends: set[asyncio.Future[Any]] = {idle} if hurry is None else {idle, hurry}
    await asyncio.wait(ends, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    if not idle.done():
        engine.fail_all(ShuttingDown("the server is shutting down"))
        await asyncio.wait({idle}, timeout=FINAL_EVENTS_SECONDS)
    idle.cancel()
