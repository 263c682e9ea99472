"""The engine runs requests on a model in steps: schedule -> launch -> wait -> commit -> emit.

On a GPU, which works while the host does, the next step is launched before the wait if it is known by then.

The engine takes requests and returns events, which are messages of `wire`. It knows neither HTTP nor processes. A request's
task (see `tasks`) turns its results into events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, wait
from itertools import chain, count

import numpy as np

from model.inference import InferenceModel
from model.prompt import PromptTokenizer
from server.engine.caches.blocks import BlockPool
from server.engine.caches.media import MediaCache
from server.engine.caches.spans import PromptSpans
from server.engine.config import EngineConfig
from server.engine.device.graphs import Recorder
from server.engine.device.runner import Launched, Runner
from server.engine.device.sampler import NOT_FINITE, Result, Sampler
from server.engine.device.step_threads import StepThreads
from server.engine.plan import Plan
from server.engine.ranks.messages import NO_FOLLOWERS, Followers
from server.engine.residents import Residents
from server.engine.scheduler import Scheduler
from server.engine.sequence import QueueOrder
from server.engine.side_work import SideWork
from server.engine.tasks.answers import Answers
from server.engine.tasks.beams import BeamAnswers
from server.engine.tasks.embedding import MediaEmbedding, TextEmbedding
from server.engine.tasks.inspection import Inspection
from server.engine.tasks.scoring import Scoring
from server.engine.tasks.task import RequestError, SequenceTask, SideTask, Task, finished_events
from server.grammar.compiler import Grammars
from server.telemetry.measures import Measures
from server.wire import (
    Abort,
    Embed,
    EmbedText,
    Encoded,
    Generate,
    Inspect,
    MediaFailed,
    MediaPixels,
    MediaWanted,
    Outbound,
    Pin,
    Request,
    Score,
)

# seconds that a step without other work waits for a grammar
GRAMMAR_WAIT = 0.005


class Engine:
    """Runs requests on a model. `salt` names weights and preprocessing in the media keys.

    `record` and `followers` are the runner's. Without `grammars`, this process compiles grammars itself, without trials;
    without `threads`, steps have all of torch's threads.
    """

    def __init__(
        self,
        model: InferenceModel,
        tokenizer: PromptTokenizer,
        config: EngineConfig,
        salt: bytes = b"",
        record: Recorder | None = None,
        clock: Callable[[], float] = time.perf_counter,
        followers: Followers = NO_FOLLOWERS,
        grammars: Grammars | None = None,
        threads: StepThreads | None = None,
    ) -> None:
        self.config = config
        self.media = MediaCache(config.num_media_slots, config.host_media_bytes, salt, config.max_kept_frames)
        self.blocks = BlockPool(config.num_blocks)
        self.residents = Residents(config, self.blocks, self.media, model.flamingo.config)
        self.scheduler = Scheduler(self.residents, clock, {*tokenizer.suppressed_ids, *tokenizer.eos_ids})
        sampler = Sampler(tokenizer.suppressed_ids, tokenizer.eos_ids)
        self.runner = Runner(model, config, sampler, self.media, record, followers)
        self.threads = threads or StepThreads()
        self._is_divided = bool(followers)
        self._overlaps = config.overlaps and not followers
        self._alone_positions = model.flamingo.config.language_model.alone_positions
        self._clock = clock
        self._measures = Measures()
        self._num_proposed = self._num_accepted = 0  # tokens, by all sequences
        self.grammars = grammars or Grammars(tokenizer)
        self._eos_ids = frozenset(tokenizer.eos_ids)
        self._numbers = count()  # of requests, in the order in which they were received
        self._sequence_tasks: dict[str, SequenceTask] = {}
        self._side_work = SideWork(self.scheduler.pace, clock)
        self._events: list[Outbound] = []
        self._ahead: Launched | None = None  # the next step, if it was launched while the one before it ran
        self._began = 0.0  # when the device could begin its current step
        self._is_stuck = False

    def has_work(self) -> bool:
        """Return whether there is an unfinished request or media item, an unsent event or a step ahead.

        An unfinished request may wait for pixels.
        """
        return bool(
            self._sequence_tasks or self._side_work.tasks or self._events or self._ahead or self.media.has_incomplete
        )

    def is_waiting_for_media(self) -> bool:
        """Return whether the last step could do nothing and no message has come in since: media must arrive first."""
        return self._is_stuck and not self._events

    def add(self, request: Request) -> None:
        """Begin a request; one that could never run ends at the next step, with an error."""
        self._is_stuck = False
        try:
            if request.request_id in self._sequence_tasks or request.request_id in self._side_work.tasks:
                raise RequestError(f"request id {request.request_id} is in use")
            task = self._create_task(request)
        except RequestError as error:
            num_answers = request.sampling.n if isinstance(request, Generate) else 1
            self._events += finished_events(request.request_id, range(num_answers), "error", str(error))
            return
        if isinstance(task, SideTask):
            self._side_work.add(task, request.client)
        else:
            self._sequence_tasks[task.request_id] = task
            if task.compiling is None:
                self._events += map(MediaWanted, self.residents.add(task.first_sequence))

    def abort(self, abort: Abort) -> None:
        """End a request, or one of its answers. A request that has ended is no error: it may end while this arrives."""
        self._is_stuck = False
        sequence_task = self._sequence_tasks.get(abort.request_id)
        if abort.index is None:
            if (task := sequence_task or self._side_work.tasks.get(abort.request_id)) is not None:
                self._handle(task, task.end("abort"))
        elif sequence_task is not None:
            self._handle(sequence_task, sequence_task.end_answer(abort.index))

    def supply(self, media: MediaPixels) -> None:
        """Give the frames of a media item to the tasks and the cache that lack them."""
        self._is_stuck = False
        frames = np.frombuffer(media.data, np.uint8).reshape(media.shape)
        for task in self._side_work.tasks.values():
            task.receive(media.digest, frames)
        self.media.supply(
            media.digest,
            frames,
            for_page=any(media.digest in task.media for task in self._tasks()),
            for_pooling=any(task.needs_pooling(media.digest) for task in self._side_work.tasks.values()),
        )

    def fail_media(self, failure: MediaFailed) -> None:
        """End the requests that still need a media item, and no others, with an error."""
        self._is_stuck = False
        self.media.fail(failure.digest)
        for task in list(self._tasks()):
            if failure.digest in task.media and self._needs(task, failure.digest):
                self._handle(task, task.end("error", failure.message))

    def pin(self, pin: Pin) -> None:
        """Keep media that have a page in their slots, and shots in their blocks, or let them go; others are ignored."""
        for key in filter(None, map(self.media.content_keys.get, pin.digests)):
            if pin.is_kept:
                self.media.slots.pin(key)
            else:
                self.media.slots.unpin(key)
        for prompt in pin.prompts:
            keys = list(filter(None, map(self.media.content_keys.get, prompt.media)))
            if len(keys) == len(prompt.media):
                hashes = PromptSpans.of(prompt, keys, self.config.block_size, self._alone_positions).hashes
                (self.blocks.pin if pin.is_kept else self.blocks.unpin)(hashes)

    def step(self) -> list[Outbound]:
        """Run one step, and return the events since the last call.

        While sequences run, events that are pending already, such as requests for pixels, are returned without a step.
        """
        if self._events and self.scheduler.running:
            return self._take_events()
        with self.threads:
            launched = self._ahead or self._launch(self._schedule())
            self._ahead = self._launch_after(launched)
            results = self._wait_for(launched)
            self.scheduler.commit(launched.plan, {result.row.sequence for result in results if result.error})
            return self._emit(launched.plan, results)

    def gauges(self) -> dict[str, float]:
        """Return the engine's gauges and counters by metric name."""
        return {
            "kv_cache_pinned_bytes": self.blocks.num_pinned * self.runner.block_bytes,
            "kv_cache_usage_perc": 1 - self.blocks.num_available / self.blocks.num_blocks,
            "media_slots": self.media.slots.num_slots,
            "media_slots_in_use": self.media.slots.num_in_use,
            "media_page_bytes": self.runner.media_page_bytes,
            "media_host_bytes": self.media.host.size,
            "media_host_hits": self.media.num_host_hits,
            "media_slots_pinned": self.media.slots.num_pinned,
            "media_evictions": self.media.slots.num_evictions,
            "media_single_flight_joins": self.media.num_joins,
            "step_threads": self.threads.number,
            "num_preemptions": self.residents.num_preemptions,
            "spec_decode_num_draft_tokens": self._num_proposed,
            "spec_decode_num_accepted_tokens": self._num_accepted,
        }

    def histograms(self) -> dict[str, dict[str, list[float]]]:
        """Return the engine's histograms as a heartbeat carries them."""
        return self._measures.snapshot()

    def _create_task(self, request: Request) -> SequenceTask | SideTask:
        """Return the task of a request. Raises `RequestError` for a request that could never run."""
        match request:
            case Generate() | Score():
                order = QueueOrder(request.priority, request.arrived, next(self._numbers), request.client)
                if isinstance(request, Score):
                    return Scoring(request, order, self.residents)
                if request.sampling.beam_width:
                    return BeamAnswers(request, order, self.residents, self._eos_ids)
                grammar = request.sampling.grammar
                compiling = (
                    None if grammar is None else self.grammars.compile(grammar, request.prompt.salt, request.client)
                )
                return Answers(request, order, self.residents, self._eos_ids, compiling)
            case Embed():
                return MediaEmbedding(request, self.media)
            case EmbedText():
                return TextEmbedding(request, self.runner)
            case Inspect() if self._is_divided:
                raise RequestError("attention cannot be inspected with tensor_parallel: a rank has some of the heads")
            case Inspect():
                return Inspection(request, self.runner, self.media)

    def _schedule(self) -> Plan:
        for task in list(self._sequence_tasks.values()):
            if events := task.prepare():
                self._handle(task, events)
        plan = self.scheduler.schedule(self._side_work.num_due_frames)
        plan.add_unread(self.media.complete())
        self._events += map(MediaWanted, [*plan.missing_media, *self._side_work.plan(plan)])
        return plan

    def _launch(self, plan: Plan) -> Launched:
        self._began = self._clock()
        return self.runner.launch(plan)

    def _launch_after(self, launched: Launched) -> Launched | None:
        """Launch the step after one that runs, if it is the same whatever the results are."""
        if not self._overlaps or self._side_work.tasks or self.media.has_incomplete or self._is_compiling():
            return None
        plan = self.scheduler.schedule_after(launched.plan)
        return None if plan is None else self.runner.launch(plan, launched)

    def _wait_for(self, launched: Launched) -> list[Result]:
        """Wait for the results of a step, and note its seconds."""
        plan, results, ended = launched.plan, launched.results(), self._clock()
        seconds, self._began = ended - self._began, ended
        self._side_work.note_step(plan, seconds)
        if not plan.is_empty:
            self._measure(plan, results, seconds)
        return results

    def _measure(self, plan: Plan, results: list[Result], seconds: float) -> None:
        """Learn from the seconds that a step took, count its tokens, and report what it has encoded."""
        if plan.rows or plan.num_frames:  # media are completed by steps without either
            self.scheduler.pace.learn(plan.work, plan.num_frames, seconds)
        num_proposed = sum(len(row.proposed) for row in plan.rows)
        self._num_proposed += num_proposed
        self._num_accepted += sum(result.is_proposed for result in results) if num_proposed else 0
        # the rows of answers that have ended since the step was launched were computed in vain
        counts = [row.count for row in plan.rows if not row.sequence.is_finished]
        self._measures.note_step(counts, num_proposed, plan.num_frames, seconds)
        if self.config.reports_encoding:
            frames = plan.frames_by_request.items()
            self._events += [Encoded(request_id=name, num_frames=count, seconds=seconds) for name, count in frames]

    def _emit(self, plan: Plan, results: list[Result]) -> list[Outbound]:
        for sequence in plan.admitted:
            self._events += self._sequence_tasks[sequence.request_id].handle_admission(sequence)
        for result in results:
            if not result.row.sequence.is_finished:
                if result.number:
                    self.scheduler.accept(result.row.sequence)
                self._emit_result(result)
        has_run = not self._ahead and self._run_side_work()
        if self.media.nonfinite:
            self._discard_nonfinite_media()
        self._is_stuck = plan.is_empty and not (has_run or self._await_grammars())
        return self._take_events()

    def _run_side_work(self) -> bool:
        """Run a round of side tasks, and return whether any could run."""
        has_run = False
        for task, events in self._side_work.run():
            self._handle(task, events)
            has_run = True
        return has_run

    def _discard_nonfinite_media(self) -> None:
        """Discard media whose encoding was not finite, and end the requests that have not read their pages yet."""
        keys = self.media.nonfinite
        readers = {s.request_id: None for s in self.scheduler.running if not keys.isdisjoint(s.media_slots)}
        for task in map(self._sequence_tasks.__getitem__, readers):
            self._handle(task, task.end("error", NOT_FINITE))
        self.media.discard(keys)
        keys.clear()

    def _take_events(self) -> list[Outbound]:
        events, self._events = self._events, []
        return events

    def _emit_result(self, result: Result) -> None:
        task = self._sequence_tasks[result.row.sequence.request_id]
        if result.error:
            suspects = list(result.row.sequence.media_slots)
            self._handle(task, task.end("error", result.error, result.param))
            self.media.discard(suspects)
        else:
            self._handle(task, task.handle_result(result))

    def _is_compiling(self) -> bool:
        return any(task.compiling is not None for task in self._sequence_tasks.values())

    def _await_grammars(self) -> bool:
        """Wait a moment for grammars that are being compiled, and return whether a task needed one in this step."""
        compiling = [task.compiling for task in self._sequence_tasks.values() if task.compiling is not None]
        wait(compiling, timeout=GRAMMAR_WAIT, return_when=FIRST_COMPLETED)
        return bool(compiling)

    def _handle(self, task: Task, events: Iterable[Outbound]) -> None:
        self._events += events
        if task.is_finished:
            self._forget(task)

    def _forget(self, task: Task) -> None:
        self._side_work.remove(task.request_id)
        if (sequence_task := self._sequence_tasks.pop(task.request_id, None)) is not None:
            sequence_task.release()
        needed = {self.media.content_keys.get(source) for other in self._tasks() for source in other.media}
        self.media.forget_frames({key for key in needed if key is not None})

    def _needs(self, task: Task, source: bytes) -> bool:
        """Return whether a task that shows a media item lacks it. An answer does not, once it has read it."""
        if isinstance(task, SideTask):
            return task.lacks_frames(source)
        return self.residents.lacks_media(task.request_id, source)

    def _tasks(self) -> Iterable[Task]:
        return chain(self._sequence_tasks.values(), self._side_work.tasks.values())
