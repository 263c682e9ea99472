"""Runs work that keeps the interpreter busy in a thread, one piece at a time, with pauses in which other requests run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from server.limits.thread_work import run_to_end
from server.limits.turns import REST, client_in_turn

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# pause of all clients per time of any work: together they get at most half of the time, from however many addresses
REST_OF_ALL = 1.0


class RestingLock:
    """A lock of one piece of work at a time. A client's work waits for a pause after the client's work before it.

    After any work there is a shorter pause of all clients. The thread does nothing else, so that work does not wait for it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="parsing")
        self._lock = asyncio.Lock()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of clients with work
        self._rested: dict[str, float] = {}
        self._all_rested = 0.0

    async def run(
        self, work: Callable[Parameters, Result], *arguments: Parameters.args, **options: Parameters.kwargs
    ) -> Result:
        """Return the result of work of the current client.

        If the request is cancelled while it waits, the work is not done. Once begun, it keeps the lock until it ends.
        """
        client = client_in_turn.get()
        with ExitStack() as waiting:
            await self._hold(self._locks.setdefault(client, asyncio.Lock()), waiting)
            await asyncio.sleep(max(self._rested.get(client, 0.0) - self._clock(), 0.0))
            await self._hold(self._lock, waiting)
            await asyncio.sleep(max(self._all_rested - self._clock(), 0.0))
            held = waiting.pop_all()

        def ended(seconds: float) -> None:
            self._rest(client, seconds)
            held.close()

        return await run_to_end(self._thread, partial(work, *arguments, **options), ended, self._clock)

    async def _hold(self, lock: asyncio.Lock, held: ExitStack) -> None:
        await lock.acquire()
        held.callback(lock.release)

    def _rest(self, client: str, seconds: float) -> None:
        """Begin the pauses after work of so many seconds."""
        now = self._clock()
        self._rested = {name: rested for name, rested in self._rested.items() if rested > now}
        self._rested[client] = now + REST * seconds
        self._all_rested = now + REST_OF_ALL * seconds
