"""A lock for work that holds the event loop: it rests after each use, and other requests are served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

# a rest in units of the work before it: such work has at most a quarter of the time
REST = 3.0


class RestingLock:
    """A lock that is free again after a rest of `REST` times as long as it was held."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = asyncio.Lock()
        self._rested = 0.0

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        async with self._lock:
            await asyncio.sleep(max(self._rested - self._clock(), 0.0))
            started = self._clock()
            try:
                yield
            finally:
                ended = self._clock()
                self._rested = ended + REST * (ended - started)
