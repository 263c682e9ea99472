"""The engine's loop is one sentence: schedule -> run -> commit -> emit.

Requests come in as messages of `wire`, events go out as messages of `wire`; nothing here knows of HTTP or processes.
"""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np

from model.flamingo import Flamingo
from model.tokenizer import PromptTokenizer
from server.engine.block_pool import BlockPool
from server.engine.config import EngineConfig
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
    PromptScored,
    Token,
    TokenLogprob,
)


class Engine:
    """`salt` names weights and preprocessing in the media keys. Not thread-safe: one loop owns it."""

    def __init__(self, model: Flamingo, tokenizer: PromptTokenizer, config: EngineConfig, salt: bytes = b"") -> None:
        if config.fold_gates:
            model.fold_gates()
        self.config = config
        self.media = MediaCache(config.num_media_slots, config.host_media_bytes, salt)
        self.blocks = BlockPool(config.num_blocks)
        all_previous = model.config.gated.attends == "all_previous"
        self.scheduler = Scheduler(config, self.blocks, self.media, all_previous=all_previous)
        self.runner = Runner(model, config, Sampler(tokenizer.suppressed_ids, tokenizer.eos_ids), self.media.host)
        self._eos = frozenset(tokenizer.eos_ids)
        self._sequences: dict[str, Sequence] = {}
        self._prompt_logprobs: dict[str, dict[int, TokenLogprob]] = defaultdict(dict)
        self._events: list[Outbound] = []
        self._is_stuck = False

    def has_work(self) -> bool:
        """Whether a step could do something: a sequence, even one that waits for pixels, or an unsent event."""
        return bool(self._sequences or self._events)

    def is_waiting_for_media(self) -> bool:
        """Whether the last step could do nothing, and nothing has come in since."""
        return self._is_stuck and not self._events

    def add(self, request: Generate) -> None:
        self._is_stuck = False
        if problem := self._refuse(request):
            self._events.append(Finished(request_id=request.request_id, finish_reason="error", error=problem))
            return
        sequence = Sequence(request)
        self._sequences[request.request_id] = sequence
        self._want(self.scheduler.add(sequence))

    def abort(self, request_id: str) -> None:
        self._is_stuck = False
        if sequence := self._sequences.get(request_id):
            self._finish(sequence, "abort")

    def supply(self, media: MediaPixels) -> None:
        self._is_stuck = False
        frames = np.frombuffer(media.data, np.uint8).reshape(media.shape)
        is_needed = any(media.digest in sequence.sources for sequence in self._sequences.values())
        self.media.supply(media.digest, frames, keep=is_needed)

    def fail_media(self, failure: MediaFailed) -> None:
        """The requests that show this media fail, and no other."""
        self._is_stuck = False
        self.media.fail(failure.digest)
        for sequence in list(self._sequences.values()):
            if failure.digest in sequence.sources:
                self._finish(sequence, "error", failure.message)

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
            "media_evictions": self.media.slots.num_evictions,
            "num_preemptions": self.scheduler.num_preemptions,
        }

    def _refuse(self, request: Generate) -> str:
        length, limit = len(request.token_ids), self.config.max_model_len
        if request.request_id in self._sequences:
            return f"request id {request.request_id} is in use"
        if length + request.sampling.max_tokens > limit:
            return f"{length} prompt tokens and max_tokens {request.sampling.max_tokens} exceed max_model_len {limit}"
        return ""

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
            self._finish(sequence, "error", result.failed)
            return
        self._score(result)
        if result.token_id is None:
            return
        if sequence.sampling.max_tokens == 0:
            self._finish(sequence, "length")
            return
        sequence.append(result.token_id)
        reason = self._finish_reason(sequence, result.token_id)
        self._events.append(
            Token(
                request_id=sequence.request_id,
                token_id=result.token_id,
                logprob=result.logprob,
                finish_reason=reason,
            )
        )
        if reason is not None:
            self._end(sequence)

    def _score(self, result: Result) -> None:
        """Collect prompt log-probabilities by position; send them when the prompt is through, before its first token."""
        sequence = result.row.sequence
        if not sequence.wants_prompt_logprobs or sequence.num_output_tokens:
            return
        scores = self._prompt_logprobs[sequence.request_id]
        scores.update(enumerate(result.prompt_logprobs, start=result.row.start + 1))
        if result.row.samples:
            scored = [scores.get(i) for i in range(sequence.num_prompt_tokens)]
            self._events.append(PromptScored(request_id=sequence.request_id, logprobs=scored))

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.sampling
        if token_id in sampling.stop_token_ids or (token_id in self._eos and not sampling.ignore_eos):
            return "stop"
        return "length" if sequence.num_output_tokens >= sampling.max_tokens else None

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str = "") -> None:
        self._events.append(Finished(request_id=sequence.request_id, finish_reason=reason, error=error))
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self._sequences[sequence.request_id]
        self._prompt_logprobs.pop(sequence.request_id, None)
        self.media.forget_frames(self.scheduler.needed_keys(self.scheduler.sequences()))


def _admitted(sequence: Sequence) -> Admitted:
    return Admitted(
        request_id=sequence.request_id,
        queue_seconds=max(time.monotonic() - sequence.arrived, 0) if sequence.arrived else 0.0,
        cached_tokens=sequence.num_cached_tokens,
        media_encoded=len(set(sequence.keys)) - sequence.num_cached_media,
        media_cached=sequence.num_cached_media,
    )
