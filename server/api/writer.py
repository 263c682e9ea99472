"""Writes long answers and long descriptions in threads of their own, in which clients take turns.

Log-probabilities of thousands of tokens take a quarter of a second. Meanwhile the event loop serves other requests,
and a client waits for at most one answer of each other client. After a description, its client pauses: it costs no step of
the engine, so that nothing else would limit a client that requests it again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from server.limits.turns import REST, ThreadTurns

# tokens with log-probabilities that are written in some milliseconds
MAX_SHOWN = 512

Result = TypeVar("Result")


class Writer:
    """A thread for answers and one for descriptions."""

    def __init__(self) -> None:
        self._answers = ThreadTurns(1, "answers")
        self._descriptions = ThreadTurns(1, "descriptions", rest=REST)

    async def write(self, num_tokens: int, work: Callable[[], Result]) -> Result:
        """Return the result of work on this number of tokens; work on many tokens runs in the thread."""
        return work() if num_tokens <= MAX_SHOWN else await self._answers(work)

    async def describe(self, work: Callable[[], Result]) -> Result:
        """Return the result of work on a description, which runs in a thread."""
        return await self._descriptions(work)
