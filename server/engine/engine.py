"""The engine's loop is one sentence: schedule -> run -> commit -> emit.

Requests come in as messages of `wire`, events go out as messages of `wire`; nothing here knows of HTTP or processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from model.flamingo import Flamingo
from model.tokenizer import PromptTokenizer
from server.engine.beams import BeamSearch, Move
from server.engine.block_pool import BlockPool
from server.engine.config import EngineConfig
from server.engine.grammar import GrammarError, Grammars
from server.engine.graphs import Recorder
from server.engine.media_cache import MediaCache
from server.engine.runner import Result, Runner
from server.engine.sampler import Sampler
from server.engine.scheduler import Plan, Scheduler
from server.engine.sequence import Sequence
from server.engine.wire import (
    Admitted,
    Finished,
    FinishReason,
    Generate,
    MediaFailed,
    MediaPixels,
    MediaWanted,
    Outbound,
    Pin,
    PromptScored,
    Token,
    TokenLogprob,
)


class RequestError(ValueError):
    """A request that this engine could never run."""


@dataclass(slots=True)
class Answers:
    """A request's answers: those that run, those held back until the prompt is computed, or the beams of a search."""

    request: Generate
    live: dict[int, Sequence]
    held_back: list[Sequence] = field(default_factory=list)
    beams: BeamSearch | None = None
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)

    def indices(self) -> set[int]:
        return self.live.keys() | {sequence.index for sequence in self.held_back}


class Engine:
    """`salt` names weights and preprocessing in the media keys; `record` is the runner's. One loop owns an engine."""

    def __init__(
        self,
        model: Flamingo,
        tokenizer: PromptTokenizer,
        config: EngineConfig,
        salt: bytes = b"",
        record: Recorder | None = None,
    ) -> None:
        if config.fold_gates:
            model.fold_gates()
        self.config = config
        self.media = MediaCache(config.num_media_slots, config.host_media_bytes, salt)
        self.blocks = BlockPool(config.num_blocks)
        all_previous = model.config.gated.attends == "all_previous"
        self.scheduler = Scheduler(config, self.blocks, self.media, all_previous=all_previous)
        self.runner = Runner(
            model, config, Sampler(tokenizer.suppressed_ids, tokenizer.eos_ids), self.media.host, record
        )
        self._eos = frozenset(tokenizer.eos_ids)
        self._grammars = Grammars(tokenizer)
        self._requests: dict[str, Answers] = {}
        self._serials = count()
        self._events: list[Outbound] = []
        self._is_stuck = False

    def has_work(self) -> bool:
        """Whether a step could do something: a request, even one that waits for pixels, or an unsent event."""
        return bool(self._requests or self._events)

    def is_waiting_for_media(self) -> bool:
        """Whether the last step could do nothing, and nothing has come in since."""
        return self._is_stuck and not self._events

    def add(self, request: Generate) -> None:
        self._is_stuck = False
        try:
            answers = self._answers(request)
        except (RequestError, GrammarError) as error:
            self._events += _finished(request, range(request.sampling.n), "error", str(error))
            return
        self._requests[request.request_id] = answers
        self._want(self.scheduler.add(answers.live[0]))

    def abort(self, request_id: str) -> None:
        self._is_stuck = False
        if request_id in self._requests:
            self._drop(request_id, "abort")

    def supply(self, media: MediaPixels) -> None:
        self._is_stuck = False
        frames = np.frombuffer(media.data, np.uint8).reshape(media.shape)
        is_needed = any(media.digest in answers.request.media for answers in self._requests.values())
        self.media.supply(media.digest, frames, keep=is_needed)

    def fail_media(self, failure: MediaFailed) -> None:
        """The requests that show this media fail, and no other."""
        self._is_stuck = False
        self.media.fail(failure.digest)
        for request_id, answers in list(self._requests.items()):
            if failure.digest in answers.request.media:
                self._drop(request_id, "error", failure.message)

    def pin(self, pin: Pin) -> None:
        for key in filter(None, map(self.media.key, pin.digests)):
            if pin.is_kept:
                self.media.slots.pin(key)
            else:
                self.media.slots.unpin(key)

    def step(self) -> list[Outbound]:
        plan = self.scheduler.schedule()
        self._is_stuck = plan.is_empty
        results = self.runner.run(plan)
        self.scheduler.commit(plan)
        return self._emit(plan, results)

    def gauges(self) -> dict[str, float]:
        """Gauges and counters of the engine by metric name."""
        return {
            "num_requests_running": len(self.scheduler.running),
            "num_requests_waiting": len(self.scheduler.waiting),
            "kv_cache_usage_perc": 1 - self.blocks.num_available / self.blocks.num_blocks,
            "media_slots_in_use": self.media.slots.num_in_use,
            "media_host_bytes": self.media.host.num_bytes,
            "media_slots_pinned": self.media.slots.num_pinned,
            "media_evictions": self.media.slots.num_evictions,
            "num_preemptions": self.scheduler.num_preemptions,
        }

    def _answers(self, request: Generate) -> Answers:
        """The sequences of a request; raises `RequestError` for one that could never run."""
        self._check(request)
        serial = next(self._serials)
        if request.sampling.beam_width:
            first = Sequence(request, serial)
            return Answers(request, {0: first}, beams=BeamSearch(first, self._eos))
        first, *others = [Sequence(request, serial, index) for index in range(request.sampling.n)]
        for sequence in (first, *others):
            if request.sampling.grammar is not None:
                sequence.matcher = self._grammars.matcher(request.sampling.grammar)
        return Answers(request, {0: first}, held_back=others)

    def _check(self, request: Generate) -> None:
        length, sampling = len(request.token_ids), request.sampling
        limit = self.config.max_model_len
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id} is in use")
        if length + sampling.max_tokens > limit:
            raise RequestError(
                f"{length} prompt tokens and max_tokens {sampling.max_tokens} exceed max_model_len {limit}"
            )
        size = self.config.block_size
        own = -(-sampling.max_tokens // size) + 2
        needed = -(-(length + sampling.max_tokens) // size) + max(sampling.beam_width - 1, 0) * own
        if needed > self.config.num_blocks:
            raise RequestError(f"{sampling.beam_width} beams need {needed} blocks, there are {self.config.num_blocks}")

    def _want(self, sources: list[bytes]) -> None:
        self._events += [MediaWanted(source) for source in sources]

    def _emit(self, plan: Plan, results: list[Result]) -> list[Outbound]:
        self._want(plan.wanted)
        self._events += [_admitted(sequence) for sequence in plan.admitted]
        for result in results:
            self._take(result)
        events, self._events = self._events, []
        return events

    def _take(self, result: Result) -> None:
        """Turn a row's result into events, and end what has ended."""
        sequence = result.row.sequence
        if sequence.is_finished:
            return
        if result.failed:
            self._drop(sequence.request_id, "error", result.failed)
            return
        self._score(result)
        if not result.row.samples:
            return
        answers = self._requests[sequence.request_id]
        for other in answers.held_back:  # the prompt is computed: the others share it
            answers.live[other.index] = other
            self._want(self.scheduler.add(other))
        answers.held_back = []
        if sequence.sampling.max_tokens == 0:
            self._end(sequence, "length")
        elif answers.beams is not None:
            self._search(answers, answers.beams, result)
        elif result.token_id is not None:
            self._append(sequence, result.token_id, result.logprob)

    def _score(self, result: Result) -> None:
        """Collect prompt log-probabilities by position; send them when the prompt is through, before its first token."""
        sequence = result.row.sequence
        if not sequence.wants_prompt_logprobs or sequence.num_output_tokens or sequence.index:
            return
        scores = self._requests[sequence.request_id].prompt_logprobs
        scores.update(enumerate(result.prompt_logprobs, start=result.row.start + 1))
        if result.row.samples and not sequence.is_scored:
            sequence.is_scored = True
            scored = [scores.get(i) for i in range(sequence.num_prompt_tokens)]
            self._events.append(PromptScored(request_id=sequence.request_id, logprobs=scored))

    def _append(self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None) -> None:
        sequence.append(token_id)
        reason = self._finish_reason(sequence, token_id)
        self._events.append(
            Token(
                request_id=sequence.request_id,
                index=sequence.index,
                token_id=token_id,
                logprob=logprob,
                finish_reason=reason,
            )
        )
        if reason is not None:
            self._release(sequence)
        elif sequence.matcher is not None:
            sequence.matcher.accept(token_id)
            if sequence.matcher.is_complete:
                self._end(sequence, "stop")

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.sampling
        if token_id in sampling.stop_token_ids or (token_id in self._eos and not sampling.ignore_eos):
            return "stop"
        return "length" if sequence.num_output_tokens >= sampling.max_tokens else None

    def _search(self, answers: Answers, beams: BeamSearch, result: Result) -> None:
        """One beam has its candidates; with the last of them, all beams take their step."""
        if not beams.report(result.row.sequence, result.candidates):
            return
        moves = beams.advance()
        if not moves:
            self._tell_best(answers, beams)
            return
        going_on: list[tuple[Sequence, Move]] = []
        for move in moves:
            is_first = all(move.parent is not sequence for sequence, _ in going_on)
            going_on.append((move.parent if is_first else self._fork(move.parent), move))
        for sequence in beams.live:
            if all(sequence is not other for other, _ in going_on):
                self.scheduler.finish(sequence)
        for sequence, move in going_on:
            sequence.append(move.token_id)
            sequence.logprobs.append(move.logprob)
        beams.live = [sequence for sequence, _ in going_on]
        answers.live = dict(enumerate(beams.live))

    def _fork(self, parent: Sequence) -> Sequence:
        child = parent.fork(parent.index)
        self.scheduler.fork(parent, child)
        return child

    def _tell_best(self, answers: Answers, beams: BeamSearch) -> None:
        request = answers.request
        for index, best in enumerate(beams.best(request.sampling.n)):
            last = len(best.token_ids) - 1
            reason: FinishReason = "stop" if best.ended_by_eos else "length"
            for place, (token_id, logprob) in enumerate(zip(best.token_ids, best.logprobs, strict=True)):
                self._events.append(
                    Token(
                        request_id=request.request_id,
                        index=index,
                        token_id=token_id,
                        logprob=TokenLogprob(token_id, logprob),
                        finish_reason=reason if place == last else None,
                    )
                )
        self._forget(request.request_id)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """One answer ends without a last token of its own."""
        self._events += _finished(sequence.request, [sequence.index], reason)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """One answer has ended; with the last of them, so has the request."""
        self.scheduler.finish(sequence)
        answers = self._requests[sequence.request_id]
        del answers.live[sequence.index]
        if not answers.live:
            self._forget(sequence.request_id)

    def _drop(self, request_id: str, reason: FinishReason, error: str = "") -> None:
        """The whole request ends, in whatever state its answers are."""
        answers = self._requests[request_id]
        ending = range(answers.request.sampling.n) if answers.beams else sorted(answers.indices())
        self._events += _finished(answers.request, ending, reason, error)
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        for sequence in self._requests.pop(request_id).live.values():
            self.scheduler.finish(sequence)
        self.media.forget_frames(self.scheduler.needed_keys(self.scheduler.sequences()))


def _finished(request: Generate, indices: Iterable[int], reason: FinishReason, error: str = "") -> list[Outbound]:
    return [Finished(request_id=request.request_id, index=i, finish_reason=reason, error=error) for i in indices]


def _admitted(sequence: Sequence) -> Admitted:
    return Admitted(
        request_id=sequence.request_id,
        queue_seconds=max(time.monotonic() - sequence.arrived, 0) if sequence.arrived else 0.0,
        cached_tokens=sequence.num_cached_tokens,
        media_encoded=len(set(sequence.keys)) - sequence.num_cached_media,
        media_cached=sequence.num_cached_media,
    )
