"""A task is a request that the engine works on; it checks the request when it is built.

A `SequenceTask` has sequences, which take part in the engine's steps; a `SideTask` runs between steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from server.engine.plan import Plan
from server.engine.sampler import Result
from server.engine.sequence import Sequence
from server.wire import Finished, FinishReason, Outbound


class RequestError(ValueError):
    """A request that this engine could never run."""


class Task:
    """One request. It fails with any of the `media` (sources) that it still needs.

    Once it `is_finished`, it has returned its last event, and the engine forgets it.
    """

    def __init__(self, request_id: str, media: Collection[bytes] = ()) -> None:
        self.request_id = request_id
        self.media = media
        self.is_finished = False

    def end(self, reason: FinishReason, error: str = "") -> Iterable[Outbound]:
        """End the whole request, in any state, without a last token."""
        self.is_finished = True
        return finished(self.request_id, self._unfinished_answers(), reason, error)

    def _unfinished_answers(self) -> Iterable[int]:
        return [0]


class SequenceTask(Task, ABC):
    """A task whose sequences take part in steps."""

    @abstractmethod
    def begin(self) -> Iterable[bytes]:
        """Queue the first sequence; return the sources to request."""

    def prepare(self) -> None:
        """Prepare for a step that is about to be scheduled."""

    @abstractmethod
    def handle_admission(self, sequence: Sequence) -> Iterable[Outbound]:
        """Note that one of the sequences has run for the first time."""

    @abstractmethod
    def handle_result(self, result: Result) -> Iterable[Outbound]:
        """Turn the result of one of the sequences' rows into events."""

    def end_answer(self, index: int) -> Iterable[Outbound]:
        """Abort one of several answers."""
        return []

    @abstractmethod
    def release(self) -> None:
        """Finish the sequences that are left, in any state."""


class SideTask(Task, ABC):
    """A task that runs in rounds, between steps. Of rounds that are a forward pass, only one is run after each step."""

    is_forward_pass: ClassVar[bool] = False

    def needs_pooling(self, source: bytes) -> bool:
        """Return whether the task needs the features of a media item, even if its page is cached."""
        return False

    def receive(self, source: bytes, frames: NDArray[np.uint8]) -> None:
        """Receive the pixels of a media item, which any task may have requested."""

    def plan(self, plan: Plan) -> Iterable[bytes]:
        """Add media to encode to a step's plan, after those of sequences; return the sources to request."""
        return []

    @property
    @abstractmethod
    def can_run(self) -> bool:
        """True if the next round would do something."""

    @abstractmethod
    def run_between_steps(self) -> Iterable[Outbound]:
        """Run one round."""


def finished(request_id: str, indices: Iterable[int], reason: FinishReason, error: str = "") -> list[Outbound]:
    """Return one event per answer that ends without a last token."""
    return [Finished(request_id=request_id, index=i, finish_reason=reason, error=error) for i in indices]
