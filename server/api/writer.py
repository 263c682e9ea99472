"""Writes long answers and descriptions in a thread of their own, in which clients take turns.

Log-probabilities of thousands of tokens take a quarter of a second. Meanwhile the event loop serves other requests,
and a client waits for at most one answer of each other client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from server.limits.turns import ThreadTurns

# tokens with log-probabilities that are written in some milliseconds
MAX_SHOWN = 512

Result = TypeVar("Result")


class Writer:
    """One thread, in which clients take turns, whatever number of answers each has."""

    def __init__(self) -> None:
        self._run = ThreadTurns(1, "answers")

    async def write(self, num_tokens: int, work: Callable[[], Result]) -> Result:
        """Return the result of work on this number of tokens; work on many tokens runs in the thread."""
        return work() if num_tokens <= MAX_SHOWN else await self.write_in_turn(work)

    async def write_in_turn(self, work: Callable[[], Result]) -> Result:
        """Return the result of work that takes some milliseconds or more, which runs in the thread."""
        return await self._run(work)
