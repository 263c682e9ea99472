"""Runs evaluations one at a time and cell by cell, with lower priority than all other requests.

Each finished cell is stored. Only a few queries run concurrently, and next to clients one at a time, with a rest after it.
The runner waits while the engine is unavailable; a cell that cannot be computed, for instance because a prompt is too long,
fails alone. An evaluation fails as a whole if several workers died during one of its queries, or while they embedded a
batch of its examples, or if several servers died during one of its cells.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import msgspec

from server.concurrency import run_concurrently
from server.errors import DatabaseUnavailable, EngineDied, ServerError, SupportSetNotFound, Unavailable
from server.fewshot.retrieval import SPACES, Space
from server.limits.background import MAX_DEATHS, Background
from server.quality.evaluation import Cell, EvaluationPlan, Outcome, PromptSetting, cell_result, failed_cell
from server.quality.evaluation_records import Evaluation, Status
from server.quality.evaluation_store import Evaluations
from server.quality.learning_curve import Curve
from server.quality.leave_one_out import LeaveOneOut, Query
from server.quality.remaining_time import RemainingTime
from server.telemetry.metrics import Metrics

# intervals for renewing a lease and storing progress, and for finding evaluations that other servers created
RENEW_SECONDS = 2.0
POLL_SECONDS = 10.0
# interval for counting the unfinished evaluations
COUNT_SECONDS = 5.0
# queries of a cell that run one after the other, on warm media, to measure latency
MAX_TIMED = 8
FIRST_PAUSE, LAST_PAUSE = 0.5, 30.0
CANCEL_SECONDS = 5.0
# after this number of servers have died while they ran the same cell, the evaluation is taken for the cause
MAX_INTERRUPTIONS = 3

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class DeadlyQuery(Exception):
    """Each worker that ran a query of the evaluation, or embedded a batch of its examples, died; or each server did."""


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
            try:
                await self._evaluations.release(self._holder)
            except DatabaseUnavailable:
                logger.warning("the running evaluation was not released: it continues when its lease has run out")

    async def _work(self) -> None:
        while True:
            self._evaluations.added.clear()
            try:
                while (evaluation := await self._evaluations.claim(self._holder)) is not None:
                    await self._run(evaluation)
            except Unavailable as error:
                # probably the database; the evaluation is claimed again when it is back
                logger.warning("evaluations cannot run now", extra={"code": error.code, "error": error.message})
            except Exception:
                # a bug: the lease runs out as if this server had died, and other evaluations get a turn
                logger.exception("running evaluations failed")
                self._evaluations.forget(self._holder)
                self._holder = uuid.uuid4().hex
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
        cells_left = (cell for index, cell in enumerate(plan.cells) if index not in evaluation.cells)
        running = _RunningEvaluation(
            evaluation,
            plan,
            self._evaluations,
            self._leave_one_out(evaluation.tenant),
            self._background,
            self._num_lanes,
            self._holder,
            num_done,
            RemainingTime(filter(None, (cell.prompt for cell in cells_left)), len(plan.queries)),
        )
        work = asyncio.create_task(running.work())
        renewal = asyncio.create_task(running.renew())
        try:
            await asyncio.wait({work, renewal}, return_when=asyncio.FIRST_COMPLETED)
            if running.is_ending:  # which ends the lease, too
                await asyncio.wait({work})
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
    remaining: RemainingTime
    # the code of the error because of which the evaluation waits
    cause: str = ""
    is_ending: bool = False
    embedded: set[Space] = field(default_factory=set)

    async def renew(self) -> None:
        """Renew the lease until the evaluation is cancelled, deleted, or claimed by another holder."""
        while await self.evaluations.renew(
            self.evaluation.id, self.holder, self.queries_done, self.remaining.seconds()
        ):
            await asyncio.sleep(RENEW_SECONDS)

    async def work(self) -> None:
        evaluations, evaluation_id, results = self.evaluations, self.evaluation.id, dict(self.evaluation.cells)
        try:
            if (number := self.evaluation.interruptions) >= MAX_INTERRUPTIONS:
                raise DeadlyQuery(
                    f"{number} servers ended while they ran the same cell, which may need too much memory"
                )
            await self._embed(["media"] if self.plan.likeness_parts else [])
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
            await self._finish("completed")

    async def _fail(self, code: str, message: str) -> None:
        await self._finish("failed", {"code": code, "message": message})

    async def _finish(self, status: Status, error: dict[str, Any] | None = None) -> None:
        self.is_ending = True
        await self.evaluations.finish(self.evaluation.id, self.holder, status, self.queries_done, error)
        self.leave_one_out.metrics.count_evaluation(status)

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
            await self._embed(SPACES.get(prompt.strategy, ()))
            self.remaining.begin()
            await run_concurrently([self._run_lane(prompt, untimed, outcomes) for _ in range(self.num_lanes)])
            await self._do(partial(self.leave_one_out.warm, timed))
            await self._run_lane(prompt, iter(timed), outcomes, is_timed=True)
        except (Unavailable, SupportSetNotFound):
            raise
        except ServerError as error:
            return error
        finally:
            self.remaining.end(prompt)
        return [outcomes[query.example.id] for query in queries]

    async def _run_lane(
        self, prompt: PromptSetting, queries: Iterator[Query], outcomes: dict[str, Outcome], *, is_timed: bool = False
    ) -> None:
        """Answer queries one after the other, and store the outcomes by example; concurrent lanes share the iterator."""
        for query in queries:
            answer = partial(self.leave_one_out.answer, self.evaluation, self.plan, prompt, query, is_timed)
            outcomes[query.example.id] = await self._do(answer)
            self.queries_done += 1
            self.remaining.count(prompt)

    async def _embed(self, spaces: Iterable[Space]) -> None:
        """Embed the examples in these spaces batch by batch, so that queries find all vectors in the database."""
        for space in {*spaces} - self.embedded:
            for batch in await self._do(partial(self.leave_one_out.batches, self.evaluation, space)):
                await self._do(batch, "embedded the same examples")
            self.embedded.add(space)

    async def _do(self, work: Callable[[], Awaitable[Result]], activity: str = "ran the same query") -> Result:
        """Do a piece of work next to clients; while the engine is unavailable, retry with growing pauses.

        Raises `DeadlyQuery` if several workers died meanwhile: `activity` is what they did.
        """
        pause, num_deaths = FIRST_PAUSE, 0
        while True:
            try:
                result = await self.background.run(work)
            except Unavailable as error:
                num_deaths += isinstance(error, EngineDied)
                if num_deaths == MAX_DEATHS:
                    message = f"{num_deaths} workers died while they {activity}, which may need too much memory"
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
