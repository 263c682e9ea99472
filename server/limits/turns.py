"""Lets clients take turns at work, such as that of a few threads."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from functools import partial
from typing import TypeVar

from server.limits.thread_work import run_to_end

# the client of the current request; "": work of the server itself
client_in_turn: ContextVar[str] = ContextVar("client_in_turn", default="")

Item = TypeVar("Item")
Result = TypeVar("Result")

# a turn costs a wait for a thread: short work for several items shares one
TURN_SECONDS = 0.005
# pause of a client per time of its work that keeps the interpreter busy: in one turn it gets at most a quarter of the time
REST = 3.0
# the work of most requests, after which there is no pause
SHORT_SECONDS = 0.005


class Turns:
    """Lets work run, up to `number` pieces at once and `max_of_client` of each client. Waiting clients take turns.

    After work of more than SHORT_SECONDS, a client may hold one turn less, for `rest` times as long as the work took. The
    pause is longer for clients that may hold more than two turns, because their threads share one interpreter.
    """

    def __init__(self, number: int, max_of_client: int | None = None, rest: float = 0.0) -> None:
        self._num_free = number
        self._max_of_client = max_of_client or number
        self._rest = rest * max(self._max_of_client / 2, 1.0)
        self._num_held: Counter[str] = Counter()  # by client
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def wait(self) -> None:
        """Wait for a turn of the current client, which ends in the next iteration of the event loop."""
        client = await self.take()
        asyncio.get_running_loop().call_soon(self.give_back, client)

    async def take(self) -> str:
        """Wait for a turn of the current client, and return the client; `give_back` must follow."""
        client = client_in_turn.get()
        if self._num_free and self._num_held[client] < self._max_of_client:
            self._hold(client)
        else:
            await self._wait(client)
        return client

    def give_back(self, client: str, seconds: float = 0.0) -> None:
        """Give a turn back after work that took this processor time."""
        self._num_free += 1
        if self._rest and seconds > SHORT_SECONDS:
            asyncio.get_running_loop().call_later(self._rest * seconds, self._release, client)
            self._pass_on()
        else:
            self._release(client)

    def _release(self, client: str) -> None:
        """Let a client hold one turn more."""
        self._num_held[client] -= 1
        if not self._num_held[client]:
            del self._num_held[client]
        self._pass_on()

    def num_waiting(self) -> int:
        """Return the number of turns for which the current client waits."""
        return len(self._waiting.get(client_in_turn.get(), ()))

    def _hold(self, client: str) -> None:
        self._num_free -= 1
        self._num_held[client] += 1

    async def _wait(self, client: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._withdraw(client, turn)
            else:  # the turn has come as well
                self.give_back(client)
            raise

    def _withdraw(self, client: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(client, deque())
        if turn in turns:
            turns.remove(turn)
        if not turns:
            self._waiting.pop(client, None)

    def _pass_on(self) -> None:
        """Give free turns to the next clients, each of which becomes the last one."""
        while self._num_free and (client := self._next()) is not None:
            turns = self._waiting.pop(client)
            while turns and turns[0].cancelled():
                turns.popleft()
            if turns:
                self._hold(client)
                turns.popleft().set_result(None)
            if turns:
                self._waiting[client] = turns

    def _next(self) -> str | None:
        """Return the client that has waited longest of those that may hold one more."""
        return next((client for client in self._waiting if self._num_held[client] < self._max_of_client), None)


class ThreadTurns(Turns):
    """Runs functions in `number` threads, which nothing else uses. While functions wait, their clients take turns.

    A function's client is that of the current request, whose context variables it reads.
    """

    def __init__(
        self,
        number: int,
        name: str,
        *,
        max_of_client: int | None = None,
        rest: float = 0.0,
        create: Callable[[int, str], Executor] = ThreadPoolExecutor,
    ) -> None:
        super().__init__(number, max_of_client, rest)
        self._threads = create(number, name)

    async def __call__(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return the result of a function.

        A function that is cancelled while it waits does not run. Once begun, it keeps its turn until it ends.
        """
        client, context = await self.take(), copy_context()
        return await run_to_end(
            self._threads, partial(context.run, function, *arguments), partial(self.give_back, client)
        )

    async def each(self, function: Callable[[Item], Result], items: Collection[Item]) -> list[Result]:
        """Return the results of a function for each item. In a turn it runs for as many items as take TURN_SECONDS."""
        results, waiting = list[Result](), iter(items)
        while len(results) < len(items):
            results += await self(_some, function, waiting)
        return results


def _some(function: Callable[[Item], Result], items: Iterator[Item]) -> list[Result]:
    """Return the results of a function for the next items, at least one, until TURN_SECONDS have passed."""
    end, results = time.monotonic() + TURN_SECONDS, list[Result]()
    for item in items:
        results.append(function(item))
        if time.monotonic() >= end:
            break
    return results
