"""Runs evaluations one at a time and cell by cell, with lower priority than all other requests.

Each finished cell is stored. Only a few queries run concurrently, and next to clients one at a time, with a rest after it.
The runner waits while the engine is unavailable; a cell that cannot be computed, for instance because a prompt is too long,
fails alone. An evaluation with a query during which several workers died fails as a whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import msgspec

from model.likeness import unit
from server.engine_client.client import Client
from server.errors import DatabaseUnavailable, EngineDied, ServerError, SupportSetNotFound, Unavailable
from server.fewshot.candidates import answer_of
from server.fewshot.classification import classify_in_context, run_concurrently
from server.fewshot.comparison import Comparison
from server.fewshot.methods import IN_CONTEXT
from server.fewshot.methods.likeness import Array, left_out_log_probabilities
from server.fewshot.prompting import assemble, find_template, read_question
from server.fewshot.retrieval import SPACES
from server.fewshot.shots import ShotSource
from server.limits.background import MAX_DEATHS, Background
from server.quality.controls import COMPARED_METHOD, ENCODER_FEATURES, with_shuffled_labels, without_media
from server.quality.evaluation import (
    Cell,
    EvaluationPlan,
    Outcome,
    PromptSetting,
    cell_result,
    failed_cell,
    left_out_together,
)
from server.quality.evaluation_store import Evaluation, Evaluations
from server.quality.learning_curve import MAX_EXAMPLES, Curve, learning_curve
from server.schemas.fewshot import ExamplesFields, FewShotFields, Method, QueryFields, TemplateFields, WeighingFields
from server.schemas.prompt import stored_media_part
from server.served_model import ServedModel
from server.store.records import Example
from server.telemetry.metrics import Metrics
from server.telemetry.request_record import RequestRecord
from server.wire import BACKGROUND_PRIORITY

# intervals for renewing a lease and storing progress, and for finding evaluations that other servers created
RENEW_SECONDS = 2.0
POLL_SECONDS = 10.0
# interval for counting the unfinished evaluations
COUNT_SECONDS = 5.0
# queries of a cell that run one after the other, on warm media, to measure latency
MAX_TIMED = 8
FIRST_PAUSE, LAST_PAUSE = 0.5, 30.0
CANCEL_SECONDS = 5.0

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class DeadlyQuery(Exception):
    """Each worker that ran a query of the evaluation died."""


@dataclass(frozen=True, slots=True)
class Query:
    """An example that is left out: the index of its label, and the log-probabilities of all labels by likeness.

    `left_out`: the ids of the example and of those that are left out with it, one of each other label.
    """

    example: Example
    left_out: list[str]
    truth: int
    likeness: dict[str, Array]


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """Classifies an example of a support set with shots from the other examples, like `/v1/classify`."""

    shots: ShotSource
    comparison: Comparison
    client: Client
    model: ServedModel
    metrics: Metrics

    async def answer(
        self, evaluation: Evaluation, plan: EvaluationPlan, prompt: PromptSetting, query: Query, is_timed: bool
    ) -> Outcome:
        record = RequestRecord(evaluation.id, self.metrics)
        record.priority = BACKGROUND_PRIORITY
        fields = self._fields(evaluation, plan, prompt, query.example)
        question = await read_question(fields, self.model, self.shots)
        if prompt.control == "text_only":
            question = without_media(question)
        # with many shots, there is no room to leave out an example of each label
        without = query.left_out[: len(question.examples) - prompt.k]
        assembled = await assemble(question, self.model, self.shots, without=without)
        if prompt.control == "shuffled_labels":
            shuffled = with_shuffled_labels(assembled.shots, f"{prompt.seed} {query.example.id}")
            assembled = await assembled.with_shots(shuffled, self.model)
        weighing = WeighingFields(**{**plan.weighing, "seed": prompt.seed})
        result = await classify_in_context(assembled, plan.candidates, weighing, record, self.model, self.client)
        return Outcome(
            truth=query.truth,
            logs={IN_CONTEXT: result.log_probabilities, **query.likeness},
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            media=record.media,
            media_encoded=record.media_encoded,
            seconds=time.monotonic() - record.arrived if is_timed else None,
        )

    async def warm(self, queries: Sequence[Query]) -> None:
        """Encode the media of these queries; those of the shots have been encoded by earlier queries."""
        store = self.shots.intake.store
        names = [media_id for query in queries for media_id in query.example.media]
        media = await asyncio.to_thread(lambda: [store.find(name) for name in names])
        if media:
            await self.client.embed(media)

    async def queries(self, evaluation: Evaluation, plan: EvaluationPlan) -> list[Query]:
        """Return the examples that are queries. Raises `SupportSetNotFound`, and the engine's errors."""
        version = await self.shots.support_sets.get_version(evaluation.support_set, evaluation.version)
        labels = [candidate.label for candidate in plan.candidates]
        parts = {part for cell in plan.cells for part in cell.parts} - {IN_CONTEXT}
        measure = partial(self.comparison.leave_out, version, plan.candidates, measure=left_out_log_probabilities)
        logs = await measure(parts - {ENCODER_FEATURES})
        if ENCODER_FEATURES in parts:
            logs[ENCODER_FEATURES] = (await measure({COMPARED_METHOD}, likeness=unit))[COMPARED_METHOD]
        indices = {example.id: index for index, example in enumerate(version.examples)}

        def build() -> list[Query]:
            left_out = left_out_together([answer_of(example) for example in version.examples])
            return [
                Query(
                    example=(example := version.examples[index]),
                    left_out=[version.examples[other].id for other in left_out(index)],
                    truth=labels.index(answer_of(example)),
                    likeness={part: logs[part][index] for part in parts},
                )
                for index in map(indices.__getitem__, plan.queries)
            ]

        return await asyncio.to_thread(build)  # with thousands of queries and labels it takes seconds

    async def learning_curves(
        self, evaluation: Evaluation, plan: EvaluationPlan, methods: Sequence[Method]
    ) -> dict[str, Curve]:
        """Return the learning curves of methods without a prompt; none for a large set. Raises as `queries`."""
        version = await self.shots.support_sets.get_version(evaluation.support_set, evaluation.version)
        if len(version.examples) > MAX_EXAMPLES:
            return {}
        return await self.comparison.leave_out(version, plan.candidates, methods, learning_curve)

    def _fields(
        self, evaluation: Evaluation, plan: EvaluationPlan, prompt: PromptSetting, query: Example
    ) -> FewShotFields:
        choice = plan.template if isinstance(plan.template, str) else TemplateFields(**plan.template)
        template = find_template(choice, self.model)
        fields = template.query_fields
        compares_text = "text" in SPACES.get(prompt.strategy, ())
        return FewShotFields(
            examples=ExamplesFields(
                support_set=evaluation.support_set,
                version=evaluation.version,
                k=prompt.k,
                strategy=prompt.strategy,
                order=plan.order if prompt.k else None,
                seed=prompt.seed,
            ),
            query=QueryFields(
                media=[stored_media_part(media_id) for media_id in query.media] if template.has_media else [],
                question=query.question if "question" in fields or compares_text else "",
                text=query.text if "text" in fields else "",
            ),
            template=choice,
            shots_attend=prompt.shots_attend,
        )


class EvaluationRunner:
    """Claims evaluations of all tenants from the database and runs them, one at a time, while the server runs."""

    def __init__(
        self,
        evaluations: Evaluations,
        leave_one_out: Callable[[str], LeaveOneOut],
        metrics: Metrics,
        background: Background,
        num_lanes: int,
    ) -> None:
        """Create a runner; `leave_one_out` returns what classifies the examples of a tenant."""
        self._evaluations = evaluations
        self._leave_one_out = leave_one_out
        self._metrics = metrics
        self._background = background
        self._num_lanes = num_lanes
        self._holder = uuid.uuid4().hex  # identifies this run of this server in leases
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._count())]

    async def stop(self) -> None:
        """Release the running evaluation; it continues after its last finished cell at the next start."""
        if self._tasks:
            await _cancel(*self._tasks)
            await self._evaluations.release(self._holder)

    async def _work(self) -> None:
        while True:
            self._evaluations.added.clear()
            try:
                while (evaluation := await self._evaluations.claim(self._holder)) is not None:
                    await self._run(evaluation)
            except Exception:
                # probably the database is unavailable; the evaluation is claimed again when it is back
                logger.exception("running evaluations failed")
            with suppress(TimeoutError):
                # not wait_for, which may swallow a cancellation that arrives together with the event
                async with asyncio.timeout(POLL_SECONDS):
                    await self._evaluations.added.wait()

    async def _count(self) -> None:
        while True:
            with suppress(DatabaseUnavailable):
                self._metrics.count_unfinished_evaluations(await self._evaluations.num_unfinished())
            await asyncio.sleep(COUNT_SECONDS)

    async def _run(self, evaluation: Evaluation) -> None:
        plan = msgspec.convert(evaluation.plan["settled"], EvaluationPlan)
        num_done = len(evaluation.cells) * len(plan.queries)
        running = _RunningEvaluation(
            evaluation,
            plan,
            self._evaluations,
            self._leave_one_out(evaluation.tenant),
            self._background,
            self._num_lanes,
            self._holder,
            num_done,
        )
        work = asyncio.create_task(running.work())
        renewal = asyncio.create_task(running.renew())
        try:
            await asyncio.wait({work, renewal}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(work, renewal)
        for task in (work, renewal):
            if not task.cancelled():
                task.result()


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks until they end: a task group may raise a concurrent failure in place of the cancellation."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=CANCEL_SECONDS)


@dataclass(slots=True)
class _RunningEvaluation:
    """A running evaluation that is leased to `holder`."""

    evaluation: Evaluation
    plan: EvaluationPlan
    evaluations: Evaluations
    leave_one_out: LeaveOneOut
    background: Background
    num_lanes: int
    holder: str
    queries_done: int
    # the code of the error because of which the evaluation waits
    cause: str = ""

    async def renew(self) -> None:
        """Renew the lease until the evaluation is cancelled, deleted, or claimed by another holder."""
        while await self.evaluations.renew(self.evaluation.id, self.holder, self.queries_done):
            await asyncio.sleep(RENEW_SECONDS)

    async def work(self) -> None:
        evaluations, evaluation_id, results = self.evaluations, self.evaluation.id, dict(self.evaluation.cells)
        try:
            queries = await self._do(partial(self.leave_one_out.queries, self.evaluation, self.plan))
            left = [(index, cell) for index, cell in enumerate(self.plan.cells) if index not in results]
            methods = [cell.method for _, cell in left if cell.prompt is None and cell.control is None]
            find_curves = partial(self.leave_one_out.learning_curves, self.evaluation, self.plan, methods)
            curves = await self._do(find_curves)
            for prompt, group in groupby(left, key=lambda item: item[1].prompt):
                outcomes = await self._outcomes(prompt, queries)
                for index, cell in group:
                    self.queries_done = (index + 1) * len(queries)
                    results[index] = result = await asyncio.to_thread(self._result, cell, outcomes, curves)
                    if not await evaluations.finish_cell(evaluation_id, self.holder, index, result, self.queries_done):
                        return
            await self._end(list(results.values()))
        except Unavailable:
            raise  # the evaluation will be claimed again
        except DeadlyQuery as error:
            await self._fail(EngineDied.code, str(error))
        except ServerError as error:
            await self._fail(error.code, error.message)
        except Exception:
            logger.exception("an evaluation failed", extra={"evaluation": evaluation_id})
            bug = ServerError("internal error")
            await self._fail(bug.code, bug.message)

    async def _end(self, results: Sequence[dict[str, Any]]) -> None:
        """End the evaluation, whose cells have these results: it fails if they all do, with the first one's error."""
        if all(result["status"] == "failed" for result in results):
            await self._fail(**results[0]["error"])
        else:
            await self.evaluations.finish(self.evaluation.id, self.holder, "completed", self.queries_done)
            self.leave_one_out.metrics.count_evaluation("completed")

    async def _fail(self, code: str, message: str) -> None:
        report = {"code": code, "message": message}
        await self.evaluations.finish(self.evaluation.id, self.holder, "failed", self.queries_done, report)
        self.leave_one_out.metrics.count_evaluation("failed")

    def _result(
        self, cell: Cell, outcomes: Sequence[Outcome] | ServerError, curves: Mapping[str, Curve]
    ) -> dict[str, Any]:
        if isinstance(outcomes, ServerError):
            return failed_cell(cell, outcomes.code, outcomes.message)
        labels = [candidate.label for candidate in self.plan.candidates]
        curve = curves.get(cell.method) if cell.control is None else None
        return cell_result(cell, outcomes, labels, curve)

    async def _outcomes(self, prompt: PromptSetting | None, queries: Sequence[Query]) -> list[Outcome] | ServerError:
        """Return the outcomes in the order of the queries; the last ones run one after the other, to measure latency.

        Return the error of a prompt that cannot be computed. Raises `SupportSetNotFound`, after which no prompt can be.
        """
        if prompt is None:
            return [Outcome(query.truth, query.likeness) for query in queries]
        timed = queries[-MAX_TIMED:]
        untimed, outcomes = iter(queries[: -len(timed)]), dict[str, Outcome]()
        try:
            await run_concurrently([self._run_lane(prompt, untimed, outcomes) for _ in range(self.num_lanes)])
            await self._do(partial(self.leave_one_out.warm, timed))
            await self._run_lane(prompt, iter(timed), outcomes, is_timed=True)
        except (Unavailable, SupportSetNotFound):
            raise
        except ServerError as error:
            return error
        return [outcomes[query.example.id] for query in queries]

    async def _run_lane(
        self, prompt: PromptSetting, queries: Iterator[Query], outcomes: dict[str, Outcome], *, is_timed: bool = False
    ) -> None:
        """Answer queries one after the other, and store the outcomes by example; concurrent lanes share the iterator."""
        for query in queries:
            answer = partial(self.leave_one_out.answer, self.evaluation, self.plan, prompt, query, is_timed)
            outcomes[query.example.id] = await self._do(answer)
            self.queries_done += 1

    async def _do(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do a piece of work next to clients; while the engine is unavailable, retry with growing pauses.

        Raises `DeadlyQuery` if the worker died each time.
        """
        pause, num_deaths = FIRST_PAUSE, 0
        while True:
            try:
                result = await self.background.run(work)
            except Unavailable as error:
                num_deaths += isinstance(error, EngineDied)
                if num_deaths == MAX_DEATHS:
                    message = f"{num_deaths} workers died while they ran the same query: it may need too much memory"
                    raise DeadlyQuery(message) from error
                self._waits_for(error.code)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LAST_PAUSE)
            else:
                self.cause = ""
                return result

    def _waits_for(self, cause: str) -> None:
        """Log a cause of waiting, but not for each retry and lane."""
        if cause != self.cause:
            logger.info("an evaluation waits because of a temporary error", extra={"code": cause})
        self.cause = cause
