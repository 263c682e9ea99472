"""Keeps a spare worker process, so that a new worker need not first import the engine, which takes seconds.

A spare has imported the engine and waits for its `Start`; it holds no model and does not use the device. The first worker
comes from a spare that is spawned before the API process has imported its own modules. A spare that dies is replaced. If
there is no usable spare, a new process is spawned, which only makes the start slower.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial

import zmq

from server.engine_client.worker_process import WorkerProcess
from server.signals import is_suspended

FIRST_PAUSE = 1.0
NO_VARIABLES: Mapping[str, str] = {}

logger = logging.getLogger(__name__)


class Spare:
    """Holds one spare, or none. `prepare` spawns it, and `take` returns it as the next worker.

    `variables` are added to the environment of all workers.
    """

    def __init__(self, factory: str, max_pause: float, variables: Mapping[str, str] = NO_VARIABLES) -> None:
        self._spawn = partial(WorkerProcess.spawn, factory, variables)
        self._max_pause = max_pause
        self._waiting: WorkerProcess | None = None
        self._keeping: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Spawn a spare, unless there is one, and replace it whenever it dies, until it is taken."""
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep())

    async def take(self) -> WorkerProcess:
        """Return the spare if it is usable, or else a new process. Raises what `WorkerProcess.spawn` raises."""
        process = await self._release()
        if process is not None and not (process.is_exiting or is_suspended(process.pid)):
            return process
        await _discard(process)
        return await self._spawn()

    async def aclose(self) -> None:
        """End the spare."""
        await _discard(await self._release())

    async def _release(self) -> WorkerProcess | None:
        """Return the spare and forget it; None if there is none."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
            self._keeping = None
        process, self._waiting = self._waiting, None
        return process

    async def _keep(self) -> None:
        """Spawn a new spare whenever one has died, after growing pauses."""
        pause = FIRST_PAUSE
        while True:
            try:
                self._waiting = await self._spawn()
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
