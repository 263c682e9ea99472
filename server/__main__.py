"""`python -m server`: read the settings, make sure there is a model, serve until a signal, drain, stop.

At SIGTERM or SIGINT ready says 503 and new requests are refused, while running ones get `shutdown_timeout` seconds to
finish; then they end with an error event. A second signal ends them at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from model.config import ConfigError
from model.zoo.default import DefaultModelError, prepare
from server import logs
from server.admission import Admission
from server.app import create_app
from server.engine_client.client import EngineClient
from server.errors import DatabaseUnavailable, ShuttingDown
from server.media.pool import DecodePool
from server.metrics import Metrics
from server.served_model import ServedModel
from server.settings import Settings, SettingsError, read_settings
from server.store.database import Database, DatabaseError
from server.wire import ENGINE_FACTORY

# time for the last error events to be written, once everything was aborted
LAST_WORDS_SECONDS = 2

logger = logging.getLogger("server")


class Server(uvicorn.Server):
    """uvicorn, but the signals are ours: it would close its doors at once, before anybody has read "not ready"."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: Settings, *, factory: str = ENGINE_FACTORY) -> int:
    """Returns the process's exit status."""
    model = ServedModel.load(settings)
    metrics = Metrics(model.name)
    decoder = DecodePool(model.config.vision, settings)
    client = EngineClient(settings, decoder, metrics, factory=factory)
    app = create_app(client, model, settings, metrics, decoder)
    await asyncio.to_thread(_check_database, app.state.services.support_sets.database)
    server = Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=LAST_WORDS_SECONDS,
        )
    )
    watching = asyncio.create_task(_watch(server, client, app.state.services.admission, settings.shutdown_timeout))
    await server.serve()
    if not server.started:
        watching.cancel()
        return 1
    return await watching


def _check_database(database: Database) -> None:
    """Before anything is loaded. Raises `DatabaseError` for one that this server must not, or cannot, use."""
    try:
        database.prepare()
    except DatabaseUnavailable as error:
        raise DatabaseError(f"database: {error.message}") from None


async def _watch(server: Server, client: EngineClient, admission: Admission, timeout: float) -> int:
    """Wait for a signal, or for a worker that cannot start; let the requests end; then stop the server."""
    signals = _signals()
    loaded = asyncio.ensure_future(client.loaded())
    signalled = asyncio.ensure_future(signals.get())
    await asyncio.wait({loaded, signalled}, return_when=asyncio.FIRST_COMPLETED)
    is_broken = loaded.done() and loaded.exception() is not None
    if is_broken:
        signalled.cancel()
    else:
        await signalled
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
    again = asyncio.ensure_future(signals.get())
    idle = asyncio.ensure_future(admission.idle())
    await asyncio.wait({again, idle}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not idle.done():
        client.fail_all(ShuttingDown("the server is shutting down"))
        await asyncio.wait({idle}, timeout=LAST_WORDS_SECONDS)
    idle.cancel()


def with_model(settings: Settings) -> Settings:
    """The same settings with a folder in `model`: the default model's, converted when it is first used."""
    if settings.model is not None:
        return settings
    logger.info("preparing the default model: its first conversion takes a minute")
    folder = prepare(settings.cache_dir)
    logger.info("the default model is ready", extra={"folder": str(folder)})
    return settings.model_copy(update={"model": str(folder)})


def main(arguments: Sequence[str]) -> int:
    try:
        settings = read_settings(arguments)
        logs.configure(settings.log_level, settings.log_format)
        return asyncio.run(serve(with_model(settings)))
    except (SettingsError, ConfigError, DatabaseError, DefaultModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
