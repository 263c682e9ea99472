"""A request while the engine works on it: what the engine's loop tells it, and what it answers.

Each kind of request has a class of its own (`answers`, `scoring`, `embedding`, `inspection`) and overrides what concerns
it. Some have sequences and take part in steps; the others have their turn behind a step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from server.engine.results import Result
from server.engine.scheduler import Plan
from server.engine.sequence import Sequence
from server.wire import Finished, FinishReason, MediaWanted, Outbound


class RequestError(ValueError):
    """A request that this engine could never run."""


class Task:
    """`is_over`: the last event has been given. Whoever holds a task then releases it."""

    has_turns: ClassVar[bool] = True  # false: it is told of its results alone, not of every step
    turn_is_forward: ClassVar[bool] = False  # one such turn a step, or those who generate would wait for all of them

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.is_over = False

    @property
    def media(self) -> Collection[bytes]:
        """Sources whose loss would be the end of this request."""
        return ()

    def begin(self) -> Iterator[Outbound]:
        """What is to be asked for at once."""
        return iter(())

    def prepare(self) -> None:
        """Before each step is scheduled."""

    def admitted(self, sequence: Sequence) -> Iterator[Outbound]:
        """One of its sequences runs for the first time."""
        return iter(())

    def take(self, result: Result) -> Iterator[Outbound]:
        """What a row of its sequences gave."""
        return iter(())

    def pools(self, source: bytes) -> bool:
        """Whether it needs the pixels of a media for its features, whatever is in the caches."""
        return False

    def supply(self, source: bytes, frames: NDArray[np.uint8]) -> None:
        """Pixels that somebody asked for."""

    def plan(self, plan: Plan) -> Iterator[Outbound]:
        """Behind the sequences' plan: media to encode with the step, and to ask for."""
        return iter(())

    def turn(self) -> Iterator[Outbound]:
        """Behind each step."""
        return iter(())

    @property
    def can_turn(self) -> bool:
        """Whether its next turn would do something."""
        return False

    def end_answer(self, index: int) -> Iterator[Outbound]:
        """One of its answers is wanted no further."""
        return iter(())

    def fail(self, reason: FinishReason, error: str = "") -> Iterator[Outbound]:
        yield Finished(request_id=self.request_id, finish_reason=reason, error=error)

    def release(self) -> None:
        """Give back whatever it holds, in whatever state it is."""


def wanted(sources: Iterable[bytes]) -> Iterator[Outbound]:
    return (MediaWanted(source) for source in sources)
