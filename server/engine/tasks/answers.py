"""A `Generate` in hand: its answers, from the first step of its prompt to the last one's finish reason.

The first answer computes the prompt, the others are held back until they can share it. In a beam search the answers'
place is taken by beams, and all is told at the end.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator

from server.engine.results import Result
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.tasks.beams import BeamSearch, Move
from server.engine.tasks.task import Task, wanted
from server.wire import (
    Admitted,
    Finished,
    FinishReason,
    Generate,
    Outbound,
    PromptScored,
    Token,
    TokenLogprob,
)


class Answers(Task):
    """`sequences`: one an answer, or the one that a beam search begins with."""

    has_turns = False

    def __init__(
        self,
        request: Generate,
        sequences: list[Sequence],
        beams: BeamSearch | None,
        scheduler: Scheduler,
        eos_ids: frozenset[int],
    ) -> None:
        super().__init__(request.request_id)
        first, *others = sequences
        self.request = request
        self._live: dict[int, Sequence] = {0: first}
        self._held_back: list[Sequence] = others
        self._beams = beams
        self._scheduler = scheduler
        self._eos = eos_ids
        self._prompt_logprobs: dict[int, TokenLogprob] = {}

    @property
    def media(self) -> Collection[bytes]:
        return self.request.prompt.media

    def begin(self) -> Iterator[Outbound]:
        yield from wanted(self._scheduler.add(self._live[0]))

    def admitted(self, sequence: Sequence) -> Iterator[Outbound]:
        yield Admitted(
            request_id=self.request_id,
            queue_seconds=queue_seconds(sequence),
            cached_tokens=sequence.num_cached_tokens,
            media_encoded=num_encoded(sequence),
            media_cached=sequence.num_cached_media,
        )

    def take(self, result: Result) -> Iterator[Outbound]:
        """Turn a row's result into events, and end what has ended."""
        sequence = result.row.sequence
        if sequence.wants_prompt_logprobs:
            yield from self._score(result)
        if not result.row.samples:
            return
        if self._held_back:
            yield from self._let_go()
        if sequence.sampling.max_tokens == 0:
            yield from self._end(sequence, "length")
        elif self._beams is not None:
            yield from self._search(self._beams, result)
        elif result.token_id is not None:
            yield from self._append(sequence, result.token_id, result.logprob)

    def end_answer(self, index: int) -> Iterator[Outbound]:
        """Of a beam search nothing was told yet: it goes on."""
        if self._beams is not None:
            return
        yield from self._let_go()
        if index in self._live:
            yield from self._end(self._live[index], "abort")

    def fail(self, reason: FinishReason, error: str = "") -> Iterator[Outbound]:
        held_back = {sequence.index for sequence in self._held_back}
        ending = range(self.request.sampling.n) if self._beams else sorted(self._live.keys() | held_back)
        yield from finished(self.request_id, ending, reason, error)

    def release(self) -> None:
        for sequence in self._live.values():
            self._scheduler.finish(sequence)
        self._live = {}

    def _let_go(self) -> Iterator[Outbound]:
        """The prompt is computed: the others share it."""
        others, self._held_back = self._held_back, []
        for other in others:
            self._live[other.index] = other
            yield from wanted(self._scheduler.add(other))

    def _score(self, result: Result) -> Iterator[Outbound]:
        """Collect prompt log-probabilities by position; send them when the prompt is through, before its first token."""
        sequence = result.row.sequence
        if sequence.num_output_tokens:
            return
        self._prompt_logprobs.update(enumerate(result.prompt_logprobs, start=result.row.start + 1))
        if result.row.samples and not sequence.is_scored:
            sequence.is_scored = True
            scored = [self._prompt_logprobs.get(i) for i in range(sequence.num_prompt_tokens)]
            yield PromptScored(request_id=self.request_id, logprobs=scored)

    def _append(self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None) -> Iterator[Outbound]:
        sequence.append(token_id)
        reason = self._finish_reason(sequence, token_id)
        yield self._token(sequence.index, token_id, logprob, reason)
        if reason is not None:
            self._release(sequence)
        elif sequence.matcher is not None:
            sequence.matcher.accept(token_id)
            if sequence.matcher.is_complete:
                yield from self._end(sequence, "stop")

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.sampling
        if token_id in sampling.stop_token_ids or (token_id in self._eos and not sampling.ignore_eos):
            return "stop"
        return "length" if sequence.num_output_tokens >= sampling.max_tokens else None

    def _token(self, index: int, token_id: int, logprob: TokenLogprob | None, reason: FinishReason | None) -> Outbound:
        return Token(request_id=self.request_id, index=index, token_id=token_id, logprob=logprob, finish_reason=reason)

    def _end(self, sequence: Sequence, reason: FinishReason) -> Iterator[Outbound]:
        """One answer ends without a last token of its own."""
        yield from finished(self.request_id, [sequence.index], reason)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """One answer has ended; with the last of them, so has the request."""
        self._scheduler.finish(sequence)
        del self._live[sequence.index]
        self.is_over = not self._live and not self._held_back

    # beams

    def _search(self, beams: BeamSearch, result: Result) -> Iterator[Outbound]:
        """One beam has its candidates; with the last of them, all beams take their step."""
        if not beams.report(result.row.sequence, result.candidates):
            return
        if moves := beams.advance():
            self._go_on(beams, moves)
        else:
            self.is_over = True
            yield from self._tell_best(beams)

    def _go_on(self, beams: BeamSearch, moves: list[Move]) -> None:
        going_on: list[tuple[Sequence, Move]] = []
        for move in moves:
            is_first = all(move.parent is not sequence for sequence, _ in going_on)
            going_on.append((move.parent if is_first else self._fork(move.parent), move))
        for sequence in beams.live:
            if all(sequence is not other for other, _ in going_on):
                self._scheduler.finish(sequence)
        for sequence, move in going_on:
            sequence.append(move.token_id)
            sequence.logprobs.append(move.logprob)
        beams.live = [sequence for sequence, _ in going_on]
        self._live = dict(enumerate(beams.live))

    def _fork(self, parent: Sequence) -> Sequence:
        child = parent.fork(parent.index)
        if not self._scheduler.fork(parent, child):
            self._scheduler.queue(child)  # computed again, when there are blocks
        return child

    def _tell_best(self, beams: BeamSearch) -> Iterator[Outbound]:
        for index, best in enumerate(beams.best(self.request.sampling.n)):
            last = len(best.token_ids) - 1
            reason: FinishReason = "stop" if best.ended_by_eos else "length"
            for place, (token_id, logprob) in enumerate(zip(best.token_ids, best.logprobs, strict=True)):
                yield self._token(index, token_id, TokenLogprob(token_id, logprob), reason if place == last else None)


def finished(request_id: str, indices: Iterable[int], reason: FinishReason, error: str = "") -> Iterator[Outbound]:
    return (Finished(request_id=request_id, index=i, finish_reason=reason, error=error) for i in indices)


def queue_seconds(sequence: Sequence) -> float:
    arrived = sequence.order.arrived
    return max(time.monotonic() - arrived, 0) if arrived else 0.0


def num_encoded(sequence: Sequence) -> int:
    return len(set(sequence.keys)) - sequence.num_cached_media
