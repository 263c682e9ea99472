"""Answers a `Score`: the prompt is computed once, as a stem, from which every candidate is forked with shared blocks.

The prompt's last logits give the log-probabilities of all first tokens, so a candidate of n tokens computes n - 1. One step
computes all candidates that fit. The others are forked from the stem when candidates have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from server.engine.config import EngineConfig
from server.engine.device.sampler import Result
from server.engine.residents import Residents
from server.engine.sequence import QueueOrder, Sequence
from server.engine.tasks.task import RequestError, SequenceTask, check_prompt
from server.wire import Outbound, Sampling, Score, Scored


class Scoring(SequenceTask):
    """The candidates of one prompt. Raises `RequestError` for candidates that are missing, empty or too long."""

    def __init__(self, request: Score, order: QueueOrder, residents: Residents) -> None:
        super().__init__(request.request_id, request.prompt.media)
        _check(request, residents.config)
        check_prompt(request.prompt, 0, residents)
        self._request = request
        self._residents = residents
        self._max_tokens = residents.config.max_tokens_per_step
        first = {len(request.prompt.token_ids) - 1: [candidate[0] for candidate in request.candidates]}
        self._stem = Sequence(request.request_id, request.prompt, Sampling(max_tokens=0), order, targets=first)
        self._stem.is_stem = True
        self.first_sequence = self._stem
        self._waiting = deque(index for index, candidate in enumerate(request.candidates) if len(candidate) > 1)
        self._live: dict[int, Sequence] = {}
        # log-probabilities of each candidate's first token, and of its later ones by position
        self._first: list[float] = []
        self._later: dict[int, dict[int, float]] = {index: {} for index in self._waiting}

    def prepare(self) -> list[Outbound]:
        """Fork candidates to fill a step, if they can run. A preempted stem is computed again first."""
        while self._waiting and self._first and self._stem.is_computed and self._num_tokens_left() < self._max_tokens:
            candidate = self._candidate(self._waiting[0])
            if not self._residents.fork_stem(self._stem, candidate):
                return []
            self._live[self._waiting.popleft()] = candidate
        if self._first and not self._waiting:
            self._finish_stem()
        return []

    def _num_tokens_left(self) -> int:
        return sum(len(sequence.token_ids) - sequence.num_computed for sequence in self._live.values())

    def handle_admission(self, sequence: Sequence) -> Iterable[Outbound]:
        return []

    def handle_result(self, result: Result) -> Iterable[Outbound]:
        sequence = result.row.sequence
        if sequence is self._stem:
            self._first = next(iter(result.target_logprobs.values()), self._first)
            if sequence.is_computed:
                self._residents.leave_seat(sequence)
        else:
            later = self._later[sequence.index]
            later.update((position, logprobs[0]) for position, logprobs in result.target_logprobs.items())
            if result.row.samples:
                self._residents.finish(self._live.pop(sequence.index))
        self.is_finished = bool(self._first) and not self._waiting and not self._live
        return [self._scored()] if self.is_finished else []

    def release(self) -> None:
        self._finish_stem()
        for sequence in self._live.values():
            self._residents.finish(sequence)
        self._live = {}

    def _finish_stem(self) -> None:
        if not self._stem.is_finished:
            self._residents.finish(self._stem)

    def _candidate(self, index: int) -> Sequence:
        """Return the prompt with all tokens of a candidate except the last, whose logits are not needed."""
        token_ids = self._request.candidates[index]
        start = len(self._request.prompt.token_ids)
        targets = {start + i: [token_id] for i, token_id in enumerate(token_ids[1:])}
        return self._stem.fork(index, token_ids[:-1], targets)

    def _scored(self) -> Scored:
        stem = self._stem
        later = [[value for _, value in sorted(self._later.get(i, {}).items())] for i in range(len(self._first))]
        return Scored(
            request_id=self.request_id,
            logprobs=[[first, *rest] for first, rest in zip(self._first, later, strict=True)],
            queue_seconds=stem.queue_seconds,
            cached_tokens=stem.num_cached_tokens,
            media_encoded=stem.num_encoded_media,
            media_cached=stem.num_cached_media,
        )


def _check(request: Score, config: EngineConfig) -> None:
    if not request.candidates or not all(request.candidates):
        raise RequestError("candidates must not be empty, and each must have at least one token")
    length, longest = len(request.prompt.token_ids), max(map(len, request.candidates))
    if length + longest > config.max_model_len:
        raise RequestError(
            f"{length} prompt tokens and a candidate of {longest} tokens exceed max_model_len {config.max_model_len}"
        )
    # the prompt's blocks, and those of one candidate, which copies the last of them
    size, num_blocks = config.block_size, request.prompt.num_blocks(config.block_size, 0)
    query = length - (request.prompt.span_starts[-1] if request.prompt.has_spans else 0)
    num_blocks += -(-(query + longest - 1) // size) - query // size if longest > 1 else 0
    if num_blocks > config.num_blocks:
        raise RequestError(f"prompt and candidate need {num_blocks} blocks, the engine has {config.num_blocks}")
