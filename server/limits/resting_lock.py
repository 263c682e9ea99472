"""A lock for work that blocks the event loop: it stays locked for a while after each use, for other requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

# pause per time of work before it: such work gets at most a quarter of the time
REST = 3.0


class RestingLock:
    """A lock that is released after a pause of `REST` times the time for which it was held."""

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
