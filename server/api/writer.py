"""Writes long answers in a thread of their own, in which clients take turns.

Log-probabilities of thousands of tokens take a quarter of a second. Meanwhile the event loop serves other requests,
and a client waits for at most one answer of each other client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from server.limits.turns import Turns

# tokens with log-probabilities that are written in some milliseconds
MAX_SHOWN = 512

Result = TypeVar("Result")


class Writer:
    """One thread, which nothing else uses. Clients that wait take turns, whatever number of answers each has."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._turns = Turns(1)

    async def write(self, client: str, num_tokens: int, work: Callable[[], Result]) -> Result:
        """Return the result of work on so many tokens: of the thread's if they are many."""
        if num_tokens <= MAX_SHOWN:
            return work()
        async with self._turns.hold(client):
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
