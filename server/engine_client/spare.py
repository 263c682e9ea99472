"""Keeps a process that has imported the engine, which takes seconds, and waits for its `Start`.

The first worker is such a process, spawned before the API process is complete; later one waits next to a ready worker. It
holds no model and does not touch the device. A spare that dies is replaced, and one that cannot serve is not taken: a
restart without a spare is only slower.
"""

from __future__ import annotations

import asyncio
import logging

import zmq

from server.engine_client.worker_process import WorkerProcess

FIRST_PAUSE = 1.0

logger = logging.getLogger(__name__)


class Spare:
    """At most one process that waits. `prepare` has one kept, and `take` hands it over."""

    def __init__(self, factory: str, max_pause: float) -> None:
        self._factory = factory
        self._max_pause = max_pause
        self._waiting: WorkerProcess | None = None
        self._keeping: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Keep a process from now on, until it is taken."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep())

    async def take(self) -> WorkerProcess:
        """Return the process that waits, or a new one. Raises what `WorkerProcess.spawn` raises."""
        process = await self._release()
        if process is not None and not (process.is_exiting or process.is_stopped):
            return process
        await _discard(process)
        return await WorkerProcess.spawn(self._factory)

    async def aclose(self) -> None:
        """End the process that waits, and keep none."""
        await _discard(await self._release())

    async def _release(self) -> WorkerProcess | None:
        """Keep no process any longer, and return the one that waits."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
            self._keeping = None
        process, self._waiting = self._waiting, None
        return process

    async def _keep(self) -> None:
        """Keep a process that waits: one that ends is replaced, with growing pauses."""
        pause = FIRST_PAUSE
        while True:
            try:
                self._waiting = await WorkerProcess.spawn(self._factory)
            except (OSError, zmq.ZMQError) as error:
                logger.warning("the spare worker could not be started", extra={"error": str(error)})
            else:
                exit_code = await self._waiting.wait()
                ended, self._waiting = self._waiting, None
                logger.warning("the spare worker ended", extra={"exit_code": exit_code})
                await _discard(ended)
            await asyncio.sleep(pause)
            pause = min(2 * pause, self._max_pause)


async def _discard(process: WorkerProcess | None) -> None:
    """End a process that has nothing to lose."""
    if process is not None:
        process.kill()
        await process.stop()
