"""Runs work that keeps the interpreter busy in a thread, one piece at a time, with pauses in which other requests run."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from server.limits.turns import client_in_turn

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# pause of a client per time of its work: it gets at most a quarter of the time
REST = 3.0


class RestingLock:
    """A lock of one piece of work at a time. A client's work waits for a pause after the client's work before it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = asyncio.Lock()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._numbers: Counter[str] = Counter()  # of pieces of work, by client
        self._rested: dict[str, float] = {}

    async def run(
        self, work: Callable[Parameters, Result], *arguments: Parameters.args, **options: Parameters.kwargs
    ) -> Result:
        """Return the result of work of the current client.

        If the request is cancelled while it waits, the work is not done. Once begun, it keeps the lock until it ends.
        """
        client = client_in_turn.get()
        lock = self._locks[client]
        self._numbers[client] += 1
        try:
            await lock.acquire()
            try:
                await asyncio.sleep(max(self._rested.get(client, 0.0) - self._clock(), 0.0))
                await self._lock.acquire()
            except BaseException:
                lock.release()
                raise
        except BaseException:
            self._forget(client)
            raise
        started = self._clock()
        working = asyncio.create_task(asyncio.to_thread(work, *arguments, **options))
        working.add_done_callback(lambda task: self._end(task, client, started))
        return await asyncio.shield(working)

    def _end(self, working: asyncio.Task[Any], client: str, started: float) -> None:
        if not working.cancelled():
            working.exception()  # it is known, even if its request was cancelled
        now = self._clock()
        self._rested = {name: rested for name, rested in self._rested.items() if rested > now}
        self._rested[client] = now + REST * (now - started)
        self._lock.release()
        self._locks[client].release()
        self._forget(client)

    def _forget(self, client: str) -> None:
        """Forget the lock of a client that has no work."""
        self._numbers[client] -= 1
        if not self._numbers[client]:
            del self._numbers[client], self._locks[client]
