"""Writes long answers in a thread of their own, in which clients take turns.

Log-probabilities of thousands of tokens take a quarter of a second. Meanwhile the event loop serves other requests,
and a client waits for at most one answer of each other client.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# tokens with log-probabilities that are written in some milliseconds
MAX_SHOWN = 512

Result = TypeVar("Result")


class Writer:
    """One thread, which nothing else uses. Clients that wait take turns, whatever number of answers each has."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._is_busy = False

    async def write(self, client: str, num_tokens: int, work: Callable[[], Result]) -> Result:
        """Return the result of work on so many tokens: of the thread's if they are many."""
        if num_tokens <= MAX_SHOWN:
            return work()
        await self._wait_for_turn(client)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._pass_on()

    async def _wait_for_turn(self, client: str) -> None:
        """Wait until it is the client's turn; `_pass_on` must follow."""
        if not self._is_busy:
            self._is_busy = True
            return
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
        """Give the turn to the next client, if one still waits."""
        while self._waiting:
            client, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._is_busy = False
