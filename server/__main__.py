"""`python -m server` reads the settings, prepares the model, serves until a signal, and drains running requests.

After SIGTERM or SIGINT, /health/ready returns 503 and new requests are refused. Running requests have
`shutdown_timeout` seconds to finish, and then end with an error event. A second signal ends them at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import uvicorn

from model.config import ConfigError
from model.hub import prepare as hub
from model.hub.sources import ModelNameError
from model.zoo.default import prepare
from model.zoo.fetch import DefaultModelError
from server import logs
from server.admission import Admission
from server.app import create_app
from server.connections import Connection, ConnectionLimits, permit_open_files
from server.engine_client.client import EngineClient
from server.errors import DatabaseUnavailable, ShuttingDown
from server.media.pool import DecodePool
from server.metrics import Metrics
from server.served_model import ServedModel
from server.settings import PROGRAM, Settings, SettingsError, read_settings
from server.store.database import Database, DatabaseError
from server.wire import ENGINE_FACTORY

# time to write the last error events after all requests were aborted
FINAL_EVENTS_SECONDS = 2
# Connections that wait to be accepted. As many are accepted in one turn of the event loop, before any request goes on.
BACKLOG = 64
# Seconds for which a thread keeps the interpreter while others wait. With Python's 5 ms, each turn of the event loop waits
# for every busy thread of the database or the tokenizer.
SWITCH_SECONDS = 0.0005

logger = logging.getLogger("server")


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals to `_watch`: its own handler would stop listening before a probe reads 503."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: Settings, *, factory: str = ENGINE_FACTORY) -> int:
    """Serve until a signal, and return the exit status."""
    sys.setswitchinterval(SWITCH_SECONDS)
    model = ServedModel.load(settings)
    metrics = Metrics(model.name)
    decoder = DecodePool(model.config.vision, settings)
    client = EngineClient(settings, decoder, metrics, factory=factory)
    app = create_app(client, model, settings, metrics, decoder)
    await _check_database(app.state.services.database)
    limits = ConnectionLimits(settings.max_connections, settings.header_timeout)
    permit_open_files(limits)
    server = Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=partial(Connection, limits=limits),  # type: ignore[arg-type]  # it is called like a class
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=FINAL_EVENTS_SECONDS,
        )
    )
    watcher = asyncio.create_task(_watch(server, client, app.state.services.admission, settings.shutdown_timeout))
    await server.serve()
    if not server.started:
        watcher.cancel()
        return 1
    return await watcher


async def _check_database(database: Database) -> None:
    """Check the database before the model is loaded. Raises `DatabaseError` if it is unavailable or of another version."""
    try:
        await database.prepare()
    except DatabaseUnavailable as error:
        raise DatabaseError(f"database: {error.message}") from None


async def _watch(server: Server, client: EngineClient, admission: Admission, timeout: float) -> int:
    """Wait for a signal or a failed start of the worker, then drain the requests and stop the server."""
    signals = _signals()
    loaded = asyncio.ensure_future(client.loaded())
    first_signal = asyncio.ensure_future(signals.get())
    await asyncio.wait({loaded, first_signal}, return_when=asyncio.FIRST_COMPLETED)
    is_broken = loaded.done() and loaded.exception() is not None
    if is_broken:
        first_signal.cancel()
    else:
        await first_signal
        loaded.cancel()
        await _drain(admission, client, timeout, signals)
    server.should_exit = True
    return int(is_broken)


def _signals() -> asyncio.Queue[int]:
    received: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, received.put_nowait, number)
    return received


async def _drain(admission: Admission, client: EngineClient, timeout: float, signals: asyncio.Queue[int]) -> None:
    admission.close()
    logger.info("shutting down", extra={"waiting": admission.num_waiting, "running": admission.num_running})
    second_signal = asyncio.ensure_future(signals.get())
    idle = asyncio.ensure_future(admission.wait_until_idle())
    await asyncio.wait({second_signal, idle}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    second_signal.cancel()
    if not idle.done():
        client.fail_all(ShuttingDown("the server is shutting down"))
        await asyncio.wait({idle}, timeout=FINAL_EVENTS_SECONDS)
    idle.cancel()


def with_model(settings: Settings) -> Settings:
    """Return settings with a model folder: that of a name, or the default model's. Either is made on first use."""
    if settings.model is not None:
        # absolute: the worker has another working directory
        folder = hub.prepare(settings.model, settings.cache_folder).absolute()
        return settings.model_copy(update={"model": str(folder)})
    logger.info("preparing the default model; the first time it is downloaded and converted, which takes a minute")
    folder = prepare(settings.cache_dir)
    logger.info("the default model is ready", extra={"folder": str(folder)})
    return settings.model_copy(update={"model": str(folder)})


def main(arguments: Sequence[str], prog: str = PROGRAM) -> int:
    """Serve until a signal, and return the exit status; `prog` is the name of the program in its usage message."""
    try:
        settings = read_settings(arguments, prog)
        logs.configure(settings.log_level, settings.log_format)
        return asyncio.run(serve(with_model(settings)))
    except (SettingsError, ConfigError, DatabaseError, DefaultModelError, ModelNameError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
