"""Delays the refusals of a client that ignores `Retry-After`: after the first ones, they are sent at a limited rate.

So refused requests of a client with few connections cost little processor time, however fast it sends them. A delayed
request has no ticket and uses no more memory than an open connection. At shutdown, delayed responses are sent at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

REFUSALS_PER_SECOND = 16
# number of refusals that are sent at once to a client that was silent before
FREE_REFUSALS = 16
MAX_PAUSE = 10.0


class Pacing:
    """Counts the refusals of each client, and delays those that come too fast.

    A client's refusals have a constant rate, which it may exceed for a moment (the generic cell rate algorithm). At most
    `max_held` are delayed, and further ones are sent at once, so that delayed refusals do not use up the connections.
    """

    def __init__(self, max_held: int, clock: Callable[[], float]) -> None:
        self._max_held = max_held
        self._clock = clock
        # by client, the time until which its refusals so far take at the constant rate; the latest refused client is last
        self._due: dict[str, float] = {}
        self._pauses: set[asyncio.Timeout] = set()
        self._is_closed = False

    def pause(self, client: str) -> float:
        """Count a refusal, and return the seconds until its turn."""
        now = self._clock()
        due = max(self._due.pop(client, 0.0), now) + 1 / REFUSALS_PER_SECOND
        latest = now + FREE_REFUSALS / REFUSALS_PER_SECOND
        self._due[client] = due = min(due, latest + MAX_PAUSE)
        self._forget(now)
        return max(due - latest, 0.0)

    async def hold(self, client: str, disconnected: Callable[[], Awaitable[None]]) -> None:
        """Wait until a refusal of this client may be sent, or until `disconnected` returns."""
        if self._is_closed or len(self._pauses) >= self._max_held:
            return
        seconds = self.pause(client)
        if not seconds:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds) as pause:
                self._pauses.add(pause)
                try:
                    await disconnected()
                finally:
                    self._pauses.discard(pause)

    def close(self) -> None:
        """End all pauses: a shutdown does not wait for refusals."""
        self._is_closed = True
        for pause in self._pauses:
            if not pause.expired():
                pause.reschedule(0.0)

    def _forget(self, now: float) -> None:
        """Forget clients whose refusals no longer count: they are treated as new ones."""
        while self._due and self._due[oldest := next(iter(self._due))] <= now:
            del self._due[oldest]
