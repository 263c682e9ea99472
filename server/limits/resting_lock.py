"""Runs work that keeps the interpreter busy in a thread, one piece at a time, and pauses after each for other requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# pause per time of work before it: such work gets at most a quarter of the time
REST = 3.0


class RestingLock:
    """A lock that is released after a pause of `REST` times the time for which it was held."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = asyncio.Lock()
        self._rested = 0.0

    async def run(
        self, work: Callable[Parameters, Result], *arguments: Parameters.args, **options: Parameters.kwargs
    ) -> Result:
        """Return the result of the work. It is held for as long as the work takes, also if its request is cancelled."""
        async with self._lock:
            await asyncio.sleep(max(self._rested - self._clock(), 0.0))
            started = self._clock()
            working = asyncio.create_task(asyncio.to_thread(work, *arguments, **options))
            try:
                return await asyncio.shield(working)
            finally:
                await asyncio.wait({working})
                ended = self._clock()
                self._rested = ended + REST * (ended - started)
