"""Tasks: the requests that the engine works on. A task checks its request when it is created.

A `SequenceTask` has sequences, which take part in the engine's steps; a `SideTask` runs between steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from model.prompt import EncodedPrompt
from server.engine.config import EngineConfig
from server.engine.device.sampler import Result
from server.engine.plan import Plan
from server.engine.residents import Residents
from server.engine.sequence import Sequence
from server.engine.shares import Account
from server.grammar.compiler import Compilation
from server.wire import Finished, FinishReason, Outbound

# number of rounds of side tasks that take as long as one step of prompt tokens
ROUNDS_PER_STEP = 16


class RequestError(ValueError):
    """A request that this engine could never run."""


class Task:
    """One request, which shows the `media` (sources). It fails if one that it still needs fails.

    Once it `is_finished`, it has returned its last event, and the engine forgets it.
    """

    def __init__(self, request_id: str, media: Collection[bytes]) -> None:
        self.request_id = request_id
        self.media = media
        self.is_finished = False

    def end(
        self, reason: FinishReason, error: str = "", param: str = "", *, is_temporary: bool = False
    ) -> list[Outbound]:
        """End the whole request, in any state, without a further token."""
        self.is_finished = True
        answers = self._unfinished_answers()
        return finished_events(self.request_id, answers, reason, error, param, is_temporary=is_temporary)

    def _unfinished_answers(self) -> Iterable[int]:
        return [0]


class SequenceTask(Task, ABC):
    """A task whose sequences take part in steps.

    `first_sequence` computes the prompt. The engine queues it at once, or `prepare` does when the grammar is compiled.
    """

    compiling: Compilation | None = None

    first_sequence: Sequence

    @abstractmethod
    def prepare(self) -> list[Outbound]:
        """Prepare for a step that is about to be scheduled."""

    @abstractmethod
    def handle_admission(self, sequence: Sequence) -> Iterable[Outbound]:
        """Note that one of the sequences has run for the first time."""

    @abstractmethod
    def handle_result(self, result: Result) -> Iterable[Outbound]:
        """Turn the result of one of the sequences' rows into events."""

    def end_answer(self, index: int) -> Iterable[Outbound]:
        """Abort one of several answers, if it has begun."""
        return []

    @abstractmethod
    def release(self) -> None:
        """Finish the sequences that are left, in any state."""


class SideTask(Task, ABC):
    """A task that runs in rounds, between steps. It has an account once it is one of the engine's."""

    account: Account

    def needs_pooling(self, source: bytes) -> bool:
        """Return whether the task needs the features of a media item, even if its page is cached."""
        return False

    def lacks_frames(self, source: bytes) -> bool:
        """Return whether the task still needs one of its media."""
        return True

    def receive(self, source: bytes, frames: NDArray[np.uint8]) -> None:
        """Receive the pixels of a media item, which any task may have requested."""

    def plan(self, plan: Plan) -> Iterable[bytes]:
        """Add media to encode to a step's plan, after those of sequences; return the sources to request."""
        return []

    @property
    def has_frames(self) -> bool:
        """True if frames of its media have arrived and wait to be encoded."""
        return False

    @property
    @abstractmethod
    def can_run(self) -> bool:
        """True if the next round would do something."""

    @abstractmethod
    def run_between_steps(self, has_time: Callable[[], bool]) -> Iterable[Outbound]:
        """Run one round, or as much of it as there is time for."""


class ForwardTask(SideTask):
    """A side task with a forward pass of its own. After a step, one such task runs a round, if there is time.

    A round takes a fraction of a step of prompt tokens, so that it delays running sequences and new requests only a little.
    The tokens of a piece pass one layer together, which costs the same time per layer for few layers as for all.
    """

    def __init__(self, request_id: str, media: Collection[bytes], config: EngineConfig, num_layers: int) -> None:
        super().__init__(request_id, media)
        self._round = max(config.max_tokens_per_step // ROUNDS_PER_STEP, 1) * num_layers  # in tokens through a layer
        self.max_tokens = min(config.max_tokens_per_step, self._round)
        self._pieces = self.pieces()

    @abstractmethod
    def pieces(self) -> Generator[float, None, Iterable[Outbound]]:
        """Return the last events; after each piece, yield how many tokens passed a layer, at most `max_tokens`."""

    def run_between_steps(self, has_time: Callable[[], bool]) -> Iterable[Outbound]:
        left: float = self._round
        try:
            while left > 0 and has_time():
                left -= next(self._pieces)
        except StopIteration as end:
            self.is_finished = True
            return end.value
        except torch.OutOfMemoryError:
            return self.end("error", "the device has not enough memory for this request")
        return []


def check_prompt(prompt: EncodedPrompt, num_new_tokens: int, residents: Residents) -> None:
    """Check that blocks and media slots can hold a prompt, whatever else is held. Raises `RequestError`.

    The blocks matter if its shots attend alone, the slots if the model reads all media of a prompt together.
    """
    config = residents.config
    if prompt.has_spans and (num_blocks := prompt.num_blocks(config.block_size, num_new_tokens)) > config.num_blocks:
        raise RequestError(f"the shots need {num_blocks} blocks, the engine has {config.num_blocks}")
    if (count := len(set(prompt.media))) > residents.max_media:
        slots = f"{residents.max_media} of the {config.num_media_slots} media slots"
        raise RequestError(f"the model reads the media of a prompt together: {count} do not fit into {slots}")


def finished_events(
    request_id: str,
    indices: Iterable[int],
    reason: FinishReason,
    error: str = "",
    param: str = "",
    *,
    is_temporary: bool = False,
) -> list[Outbound]:
    """Return one event per answer that ends without a last token."""
    event = Finished(request_id=request_id, finish_reason=reason, error=error, param=param, is_temporary=is_temporary)
    return [replace(event, index=index) for index in indices]
