"""Lets clients take turns at the work of a few threads."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar, copy_context
from typing import TypeVar

# the client of the current request; "": work of the server itself
client_in_turn: ContextVar[str] = ContextVar("client_in_turn", default="")

Item = TypeVar("Item")
Result = TypeVar("Result")

# a turn costs a wait for a thread: short work for several items shares one
TURN_SECONDS = 0.005


class ThreadTurns:
    """Runs functions in `number` threads, which nothing else uses. While functions wait, their clients take turns.

    A function's client is that of the current request, whose context variables it reads.
    """

    def __init__(self, number: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(number, thread_name_prefix=name)
        self._num_free = number
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def __call__(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return the result of a function. A function that is cancelled while it waits does not run."""
        async with self.hold():
            run = copy_context().run
            return await asyncio.get_running_loop().run_in_executor(self._threads, run, function, *arguments)

    async def each(self, function: Callable[[Item], Result], items: Collection[Item]) -> list[Result]:
        """Return the results of a function for each item. In a turn it runs for as many items as take TURN_SECONDS."""
        results, waiting = list[Result](), iter(items)
        while len(results) < len(items):
            results += await self(_some, function, waiting)
        return results

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Wait for a turn of the client, and hold it for the block."""
        if self._num_free:
            self._num_free -= 1
        else:
            await self._wait(client_in_turn.get())
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, client: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._withdraw(client, turn)
            else:  # the turn has come as well
                self._pass_on()
            raise

    def _withdraw(self, client: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(client, deque())
        if turn in turns:
            turns.remove(turn)
        if not turns:
            self._waiting.pop(client, None)

    def _pass_on(self) -> None:
        """Give a turn to the next client, which becomes the last one."""
        while self._waiting:
            client, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._num_free += 1


def _some(function: Callable[[Item], Result], items: Iterator[Item]) -> list[Result]:
    """Return the results of a function for the next items, at least one, until TURN_SECONDS have passed."""
    end, results = time.monotonic() + TURN_SECONDS, list[Result]()
    for item in items:
        results.append(function(item))
        if time.monotonic() >= end:
            break
    return results
