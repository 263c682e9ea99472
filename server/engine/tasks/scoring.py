"""A `Score` in hand: its prompt is computed once and stays as a stem, from which every candidate goes on in shared blocks.

The prompt's last logits give all first tokens at once; a candidate of n tokens then computes n - 1, all candidates that
fit in one step. Those that find no seat or no blocks fork from the stem when others have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator

from server.engine.results import Result
from server.engine.scheduler import Scheduler
from server.engine.sequence import Order, Sequence
from server.engine.tasks.answers import num_encoded, queue_seconds
from server.engine.tasks.task import Task, wanted
from server.wire import Outbound, Sampling, Score, Scored


class Scoring(Task):
    def __init__(self, request: Score, order: Order, scheduler: Scheduler) -> None:
        super().__init__(request.request_id)
        self._request = request
        self._scheduler = scheduler
        self._stem = _stem(request, order)
        self._is_stem_done = False
        self._queue_seconds = 0.0
        self._waiting = deque(place for place, candidate in enumerate(request.candidates) if len(candidate) > 1)
        self._live: dict[int, Sequence] = {}
        self._first: list[float] = []  # of each candidate's first token
        self._later: dict[int, dict[int, float]] = {place: {} for place in self._waiting}  # of the others, by position

    @property
    def media(self) -> Collection[bytes]:
        return self._request.prompt.media

    def admitted(self, sequence: Sequence) -> Iterator[Outbound]:
        self._queue_seconds = queue_seconds(sequence)
        return iter(())

    def begin(self) -> Iterator[Outbound]:
        yield from wanted(self._scheduler.add(self._stem))

    def prepare(self) -> None:
        """Let candidates go on from the prompt. A stem that was preempted is computed again first."""
        while self._waiting and self._first and self._stem.is_computed:
            candidate = self._candidate(self._waiting[0])
            if not self._scheduler.fork_stem(self._stem, candidate):
                return
            self._live[self._waiting.popleft()] = candidate
        if self._first and not self._waiting:
            self._finish_stem()

    def take(self, result: Result) -> Iterator[Outbound]:
        sequence = result.row.sequence
        if sequence is self._stem:
            self._first = next(iter(result.target_logprobs.values()), self._first)
        else:
            later = self._later[sequence.index]
            later.update((position, values[0]) for position, values in result.target_logprobs.items())
            if result.row.samples:
                self._scheduler.finish(self._live.pop(sequence.index))
        if self._first and not self._waiting and not self._live:
            self.is_over = True
            yield self._scored()

    def release(self) -> None:
        self._finish_stem()
        for sequence in self._live.values():
            self._scheduler.finish(sequence)
        self._live = {}

    def _finish_stem(self) -> None:
        if not self._is_stem_done:
            self._is_stem_done = True
            self._scheduler.finish(self._stem)

    def _candidate(self, place: int) -> Sequence:
        """The prompt and all of the candidate's tokens but the last, which nothing follows."""
        token_ids = self._request.candidates[place]
        start = len(self._request.prompt.token_ids)
        targets = {start + i: [token_id] for i, token_id in enumerate(token_ids[1:])}
        return self._stem.fork(place, token_ids[:-1], targets)

    def _scored(self) -> Scored:
        stem = self._stem
        later = [[value for _, value in sorted(self._later.get(i, {}).items())] for i in range(len(self._first))]
        return Scored(
            request_id=self.request_id,
            logprobs=[[first, *rest] for first, rest in zip(self._first, later, strict=True)],
            queue_seconds=self._queue_seconds,
            cached_tokens=stem.num_cached_tokens,
            media_encoded=num_encoded(stem),
            media_cached=stem.num_cached_media,
        )


def _stem(request: Score, order: Order) -> Sequence:
    last = len(request.prompt.token_ids) - 1
    targets = {last: [candidate[0] for candidate in request.candidates]}
    stem = Sequence(request.request_id, request.prompt, Sampling(max_tokens=0), order, targets=targets)
    stem.is_stem = True
    return stem
