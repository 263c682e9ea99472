"""Makes background work yield to requests of clients, in the API process as in the engine.

In the engine, the work has a lower priority. But no scheduler limits its use of the API process and of the processors that
both share. So while clients have requests, one piece of work runs at a time, with a pause after each. Nothing waits for
ever.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from server.limits.admission import Admission
from server.limits.turns import REST

MAX_REST_SECONDS = 10.0
# after this number of workers have died during a piece of background work, it is taken for the cause
MAX_DEATHS = 3

Result = TypeVar("Result")


class Background:
    """Runs pieces of work in the background: concurrently while no client has a request, else one at a time."""

    def __init__(self, admission: Admission, clock: Callable[[], float] = time.monotonic) -> None:
        self._admission = admission
        self._clock = clock
        self._turn = asyncio.Lock()
        self._rested = 0.0

    async def run(self, work: Callable[[], Awaitable[Result]]) -> Result:
        if self._admission.is_quiet:
            return await self._run(work)
        async with self._turn:
            await self._rest()
            return await self._run(work)

    async def _rest(self) -> None:
        """Return when the rest is over or clients have been quiet for a moment, whichever comes first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(self._rested - self._clock(), 0.0)):
                await self._admission.wait_until_quiet()

    async def _run(self, work: Callable[[], Awaitable[Result]]) -> Result:
        started = self._clock()
        try:
            return await work()
        finally:
            ended = self._clock()
            self._rested = ended + min(REST * (ended - started), MAX_REST_SECONDS)
