"""Keeps a worker process running: starts it, and restarts it with growing pauses when it has died. Pure asyncio.

While a worker is ready, a spare process is kept, which becomes the next worker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

import zmq

from server.engine_client.spare import Spare
from server.engine_client.worker_process import WorkerProcess
from server.errors import EngineDied
from server.settings import Settings, SettingsError
from server.telemetry.metrics import Metrics

FIRST_DELAY = 0.5
# a worker that served this long was healthy: the next one is started without a pause
HEALTHY_SECONDS = 60.0
# consecutive failed starts until the state is "failed"; further starts are tried
MAX_FAILED_STARTS = 3

State = Literal["starting", "ready", "restarting", "failed", "stopped"]

logger = logging.getLogger(__name__)


class Supervisor:
    """Starts workers one after another. `worker` is the current one while it is ready; `info` comes from its `Ready`."""

    def __init__(self, settings: Settings, spare: Spare, metrics: Metrics) -> None:
        self._state: State = "starting"
        self.info: dict[str, Any] = {}
        self.worker: WorkerProcess | None = None
        self._settings = settings
        self._spare = spare
        self._metrics = metrics
        self._start_settled = asyncio.Event()  # the first worker became ready, or failed
        self._ready_since: float | None = None  # of the current worker
        self._num_failed_starts = 0
        self._refusal: str | None = None  # of the current worker

    @property
    def state(self) -> State:
        """The current state: a worker that begins to exit is not ready, even before its end is noticed."""
        is_dying = self._state == "ready" and self.worker is not None and self.worker.is_exiting
        return "restarting" if is_dying else self._state

    async def workers(self) -> AsyncGenerator[WorkerProcess, None]:
        """Yield one worker after another; the caller serves each until it is dead.

        If a worker dies before any was ready, it is the last one: a wrong folder or too little memory would stop the next
        one too. Later, failed starts are repeated for ever, with growing pauses, because memory or a file may come back.
        """
        delay = 0.0
        async with aclosing(self._spare):
            while True:
                try:
                    worker = await self._spare.take()
                except (OSError, zmq.ZMQError):  # too many processes or open files, or too little memory
                    logger.exception("the worker could not be started")
                    self._note_end()
                else:
                    try:
                        worker.start(self._settings)
                        yield worker
                    finally:
                        self._note_end()
                        is_expected = self._state == "stopped" or self._refusal is not None
                        level = logging.INFO if is_expected else logging.ERROR
                        logger.log(level, "the worker ended", extra={"exit_code": await worker.stop()})
                if not self._start_settled.is_set():
                    self._state = "failed"
                    self._start_settled.set()
                    return
                delay = 0.0 if self._was_healthy() else delay
                if self._refusal is not None:
                    logger.error("the worker could not be started: %s", self._refusal)
                    self._refusal = None
                logger.warning("the worker is restarted", extra={"delay_seconds": delay})
                await asyncio.sleep(delay)
                delay = min(max(FIRST_DELAY, delay * 2), self._settings.max_restart_delay)
                self._ready_since = None
                self._metrics.engine_restarts.inc()

    def become_ready(self, worker: WorkerProcess, info: dict[str, Any]) -> None:
        self._state, self.worker, self.info = "ready", worker, info
        self._ready_since, self._num_failed_starts = time.monotonic(), 0
        self._metrics.engine_ready.set(1)
        self._start_settled.set()
        # /version has the rest
        logger.info("the engine is ready", extra={k: info[k] for k in ("device", "load_seconds") if k in info})
        if self._settings.spare_worker:
            self._spare.prepare()

    def refuse(self, worker: WorkerProcess, message: str) -> None:
        """Note why a worker cannot start, and stop it."""
        self._refusal = message
        worker.kill()

    def kill(self, worker: WorkerProcess) -> None:
        """Kill the current worker; another one is started when it has ended."""
        self._state, self.worker = "restarting", None
        self._metrics.engine_ready.set(0)
        worker.kill()

    async def loaded(self) -> None:
        """Wait until the first worker is ready.

        Raises `SettingsError` if it refused its settings, and `EngineDied` if it died.
        """
        await self._start_settled.wait()
        if self._refusal is not None:
            raise SettingsError(self._refusal)
        if self._state == "failed":
            raise EngineDied("the engine could not be started")

    def close(self) -> None:
        """Refuse requests from now on. The current worker ends when `workers` is closed."""
        self._state, self.worker = "stopped", None

    def _was_healthy(self) -> bool:
        return self._ready_since is not None and time.monotonic() - self._ready_since > HEALTHY_SECONDS

    def _note_end(self) -> None:
        """Note that the current worker no longer serves requests."""
        self._metrics.engine_ready.set(0)
        if self._state == "stopped":
            return
        self._num_failed_starts += self._ready_since is None
        self._state = "failed" if self._num_failed_starts >= MAX_FAILED_STARTS else "restarting"
        self.worker = None
