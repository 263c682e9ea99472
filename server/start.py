"""Starts the server: reads the settings, prepares the model, and serves until a signal arrives.

The worker is spawned first, and imports the engine while this process imports the web framework. A signal during startup
ends the processes that were spawned, and removes their files.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import aclosing
from importlib import import_module
from pathlib import Path
from typing import Any

from model.config import ConfigError
from model.zoo.default import DEFAULT, prepare
from model.zoo.fetch import DefaultModelError
from server.address import check_address
from server.allocator import return_freed_memory
from server.engine_client.spare import Spare
from server.engine_client.thread_binding import thread_variables
from server.settings import (
    PROGRAM,
    Settings,
    SettingsError,
    opentelemetry_variables,
    read_settings,
    trusted_proxies,
)
from server.signals import ending_signals, raise_ending_signals
from server.telemetry import logs
from server.telemetry.variables import check_context
from server.wire import ENGINE_FACTORY

logger = logging.getLogger("server")


async def start(settings: Settings, *, factory: str = ENGINE_FACTORY) -> int:
    """Spawn the worker, serve until a signal, and return the exit status. SIGTERM or SIGHUP during startup cancels it."""
    if (starting := asyncio.current_task()) is not None:
        for number in set(ending_signals()) - {signal.SIGINT}:  # which asyncio handles
            asyncio.get_running_loop().add_signal_handler(number, _cancel, starting)
    async with aclosing(Spare(factory, settings.max_restart_delay, thread_variables(settings))) as spare:
        spare.prepare()
        # in a thread, so that the event loop can spawn the worker
        serving = await asyncio.to_thread(_import_serving)
        status: int = await serving.serve(settings, spare)
        return status


def _import_serving() -> Any:
    """Import the web framework. FastAPI imports OpenTelemetry, which reads two variables then. Raises `SettingsError`."""
    try:
        check_context(opentelemetry_variables())
    except ValueError as error:
        raise SettingsError(str(error)) from None
    # imports create many lasting objects and little garbage: collections would take a seventh of the time
    gc.disable()
    try:
        return import_module("server.serving")
    except ValueError as error:
        if "Propagator" not in str(error):
            raise
        raise SettingsError(f"OTEL_PROPAGATORS: {error}") from None
    finally:
        gc.freeze()
        gc.enable()


def _cancel(task: asyncio.Task[Any]) -> None:
    if not task.cancelling():  # a second signal must not cancel the clean-up
        task.cancel()


def with_model(settings: Settings) -> Settings:
    """Return settings in which `model` is a folder: that of the named model, or the default model's, imported on first use.

    Raises `SettingsError` and `DefaultModelError`.
    """
    if settings.model == DEFAULT.name and not Path(DEFAULT.name).is_dir():
        settings = settings.model_copy(update={"model": None})
    if settings.model is None or not Path(settings.model).is_dir():
        _create_cache(settings.cache_folder)
    if settings.model is not None:
        folder = _named_model(settings.model, settings.cache_folder)
    else:
        folder = prepare(settings.cache_folder)
        logger.info("the default model's files are present", extra={"folder": str(folder)})
    # absolute: the worker has another working directory
    return settings.model_copy(update={"model": str(folder.absolute())})


def _named_model(name: str, cache: Path) -> Path:
    """Return the folder of a named model. The default model does not wait for these imports."""
    hub = import_module("model.hub.prepare")
    try:
        folder: Path = hub.prepare(name, cache)
    except (ConfigError, hub.ModelNameError) as error:
        raise SettingsError(f"model: {error}") from None
    return folder


def _create_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cache_dir: the folder {folder} cannot be created: {error.strerror}") from None


def main(arguments: Sequence[str], prog: str = PROGRAM) -> int:
    """Serve until a signal, and return the exit status; `prog` is the name of the program in its usage message."""
    return_freed_memory()
    try:
        settings = read_settings(arguments, prog)
        logs.configure(settings.log_level, settings.log_format)
        check_address(settings.host, settings.port)
        trusted_proxies()
        # signals become exceptions, so that `run_import` ends an import, which would otherwise outlive this process
        raise_ending_signals()
        return asyncio.run(start(with_model(settings)))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    except (SettingsError, DefaultModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
