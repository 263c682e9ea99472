"""The engine's loop is one sentence: schedule -> run -> commit -> emit.

Requests come in as messages of `wire`, events go out as messages of `wire`; nothing here knows of HTTP or processes. What a
request makes of its results is its own business (see `tasks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from model.flamingo import Flamingo
from model.tokenizer import PromptTokenizer
from server.engine.block_pool import BlockPool
from server.engine.config import EngineConfig
from server.engine.graphs import Recorder
from server.engine.media_cache import MediaCache
from server.engine.results import Result
from server.engine.runner import Runner
from server.engine.sampler import Sampler
from server.engine.scheduler import Plan, Scheduler
from server.engine.sequence import Order, Sequence
from server.engine.tasks.answers import Answers, finished
from server.engine.tasks.beams import BeamSearch
from server.engine.tasks.embedding import MediaEmbedding, TextEmbedding
from server.engine.tasks.inspection import Inspection
from server.engine.tasks.scoring import Scoring
from server.engine.tasks.task import RequestError, Task, wanted
from server.grammar import GrammarError, Grammars
from server.wire import (
    Abort,
    Embed,
    EmbedText,
    FinishReason,
    Generate,
    Inspect,
    MediaFailed,
    MediaPixels,
    Outbound,
    Pin,
    Request,
    Score,
)


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
        self.runner = Runner(model, config, Sampler(tokenizer.suppressed_ids, tokenizer.eos_ids), self.media, record)
        self._eos = frozenset(tokenizer.eos_ids)
        self._grammars = Grammars(tokenizer)
        self._requests: dict[str, Task] = {}
        self._having_turns: dict[str, Task] = {}
        self._serials = count()
        self._events: list[Outbound] = []
        self._is_stuck = False

    def has_work(self) -> bool:
        """Whether a step could do something: a request, even one that waits for pixels, or an unsent event."""
        return bool(self._requests or self._events)

    def is_waiting_for_media(self) -> bool:
        """Whether the last step could do nothing, and nothing has come in since."""
        return self._is_stuck and not self._events

    def add(self, request: Request) -> None:
        self._is_stuck = False
        try:
            task = self._task(request)
        except (RequestError, GrammarError) as error:
            num_answers = request.sampling.n if isinstance(request, Generate) else 1
            self._events += finished(request.request_id, range(num_answers), "error", str(error))
            return
        self._requests[request.request_id] = task
        if task.has_turns:
            self._having_turns[request.request_id] = task
        self._events += task.begin()

    def abort(self, abort: Abort) -> None:
        self._is_stuck = False
        if (task := self._requests.get(abort.request_id)) is None:
            return
        if abort.index is None:
            self._drop(task, "abort")
        else:
            self._hear(task, task.end_answer(abort.index))

    def supply(self, media: MediaPixels) -> None:
        self._is_stuck = False
        frames = np.frombuffer(media.data, np.uint8).reshape(media.shape)
        for task in self._requests.values():
            task.supply(media.digest, frames)
        self.media.supply(
            media.digest,
            frames,
            for_page=any(media.digest in task.media for task in self._requests.values()),
            for_pooling=any(task.pools(media.digest) for task in self._requests.values()),
        )

    def fail_media(self, failure: MediaFailed) -> None:
        """The requests that show this media fail, and no other."""
        self._is_stuck = False
        self.media.fail(failure.digest)
        for task in list(self._requests.values()):
            if failure.digest in task.media:
                self._drop(task, "error", failure.message)

    def pin(self, pin: Pin) -> None:
        for key in filter(None, map(self.media.key, pin.digests)):
            if pin.is_kept:
                self.media.slots.pin(key)
            else:
                self.media.slots.unpin(key)

    def step(self) -> list[Outbound]:
        plan = self._schedule()
        results = self.runner.run(plan)
        self.scheduler.commit(plan, {result.row.sequence for result in results if result.failed})
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

    def _task(self, request: Request) -> Task:
        """A request in hand; raises `RequestError` for one that could never run."""
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id} is in use")
        match request:
            case Generate():
                return self._answers(request)
            case Score():
                self._check_score(request)
                return Scoring(request, self._order(request), self.scheduler)
            case Embed():
                return MediaEmbedding(request, self.media)
            case EmbedText():
                self._check_texts(request)
                return TextEmbedding(request, self.runner, self.config.max_tokens_per_step)
            case Inspect():
                self._check_inspection(request)
                return Inspection(request, self.runner, self.media)

    def _answers(self, request: Generate) -> Answers:
        self._check(request)
        sampling, order = request.sampling, self._order(request)
        num_sequences = 1 if sampling.beam_width else sampling.n
        sequences = [
            Sequence(request.request_id, request.prompt, sampling, order, index) for index in range(num_sequences)
        ]
        beams = BeamSearch(sequences[0], self._eos) if sampling.beam_width else None
        if sampling.grammar is not None and beams is None:
            for sequence in sequences:
                sequence.matcher = self._grammars.matcher(sampling.grammar)
        return Answers(request, sequences, beams, self.scheduler, self._eos)

    def _order(self, request: Generate | Score) -> Order:
        return Order(request.priority, request.arrived, next(self._serials))

    def _check(self, request: Generate) -> None:
        length, sampling = len(request.prompt.token_ids), request.sampling
        limit = self.config.max_model_len
        if length + sampling.max_tokens > limit:
            raise RequestError(
                f"{length} prompt tokens and max_tokens {sampling.max_tokens} exceed max_model_len {limit}"
            )
        size = self.config.block_size
        own = -(-sampling.max_tokens // size) + 2
        needed = -(-(length + sampling.max_tokens) // size) + max(sampling.beam_width - 1, 0) * own
        if needed > self.config.num_blocks:
            raise RequestError(f"{sampling.beam_width} beams need {needed} blocks, there are {self.config.num_blocks}")

    def _check_score(self, request: Score) -> None:
        if not request.candidates or not all(request.candidates):
            raise RequestError("no candidates, or one without tokens")
        length, longest = len(request.prompt.token_ids), max(map(len, request.candidates))
        if length + longest > self.config.max_model_len:
            limit = self.config.max_model_len
            raise RequestError(f"{length} prompt tokens and a candidate of {longest} exceed max_model_len {limit}")
        # the prompt's blocks, and those of one candidate, which copies the last of them
        size = self.config.block_size
        needed = -(-length // size) + (-(-(length + longest - 1) // size) - length // size if longest > 1 else 0)
        if needed > self.config.num_blocks:
            raise RequestError(f"prompt and candidate need {needed} blocks, there are {self.config.num_blocks}")

    def _check_texts(self, request: EmbedText) -> None:
        if not all(request.texts):
            raise RequestError("a text without tokens")
        longest = max(map(len, request.texts), default=0)
        if longest > self.config.max_model_len:
            raise RequestError(f"a text of {longest} tokens exceeds max_model_len {self.config.max_model_len}")

    def _check_inspection(self, request: Inspect) -> None:
        length, gated = len(request.prompt.token_ids), self.runner.model.config.gated_layers
        if length > self.config.max_model_len:
            raise RequestError(f"{length} tokens exceed max_model_len {self.config.max_model_len}")
        if not 0 <= request.token < length:
            raise RequestError(f"token {request.token} is none of {length}")
        if unknown := set(request.layers).difference(gated):
            raise RequestError(f"layers {sorted(unknown)} are none of the gated ones {list(gated)}")

    def _schedule(self) -> Plan:
        for task in self._having_turns.values():
            task.prepare()
        plan = self.scheduler.schedule()
        self._events += wanted(plan.wanted)
        for task in self._having_turns.values():
            self._events += task.plan(plan)
        return plan

    def _emit(self, plan: Plan, results: list[Result]) -> list[Outbound]:
        for sequence in plan.admitted:
            self._events += self._requests[sequence.request_id].admitted(sequence)
        for result in results:
            self._take(result)
        turning = self._turning()
        for task in turning:
            self._hear(task, task.turn())
        self.media.discard(self.media.nonfinite)
        self.media.nonfinite.clear()
        self._is_stuck = not (plan.rows or plan.encodings or turning)
        events, self._events = self._events, []
        return events

    def _turning(self) -> list[Task]:
        """Who has a turn behind this step; of those that need a forward of their own, the first to come."""
        able = [task for task in self._having_turns.values() if task.can_turn]
        return [task for task in able if not task.turn_is_forward] + [w for w in able if w.turn_is_forward][:1]

    def _take(self, result: Result) -> None:
        sequence = result.row.sequence
        if sequence.is_finished:
            return
        task = self._requests[sequence.request_id]
        if result.failed:
            suspects = list(sequence.held)
            self._drop(task, "error", result.failed)
            self.media.discard(suspects)
        else:
            self._hear(task, task.take(result))

    def _hear(self, task: Task, events: Iterator[Outbound]) -> None:
        self._events += events
        if task.is_over:
            self._forget(task)

    def _drop(self, task: Task, reason: FinishReason, error: str = "") -> None:
        """The whole request ends, in whatever state it is."""
        self._events += task.fail(reason, error)
        self._forget(task)

    def _forget(self, task: Task) -> None:
        del self._requests[task.request_id]
        self._having_turns.pop(task.request_id, None)
        task.release()
        needed = {self.media.key(source) for other in self._requests.values() for source in other.media}
        self.media.forget_frames({key for key in needed if key is not None})
