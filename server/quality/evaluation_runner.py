"""Evaluations at work: one at a time, behind all other traffic, a cell after the other, each kept when it is finished.

Its requests have the last priority and only a few run at once. An engine that is away is waited for; a cell that cannot
be (a prompt that is too long, say) has failed, and the others go on.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import msgspec

from server.asking import Asking
from server.errors import ServerError, Unavailable
from server.fewshot.candidates import Candidate
from server.fewshot.classification import classify, together
from server.fewshot.prompting import assemble, template_of
from server.fewshot.retrieval import SPACES
from server.fewshot.scoring import Weighing
from server.fewshot.templates import places
from server.media.source import kind_of
from server.quality.evaluation import Cell, Outcome, cell_result, failed_cell
from server.quality.evaluation_store import Evaluation
from server.schemas.fewshot import FewShotFields, Order
from server.services import Services
from server.store.records import Example

# behind every client's: lower runs first
PRIORITY = 2**31 - 1
# how often a lease is renewed and progress written, and how often somebody looks for evaluations of other servers
RENEW_SECONDS = 2.0
POLL_SECONDS = 10.0
# queries of a cell that run alone, on media that are warm, for its latency
MAX_TIMED = 8
FIRST_PAUSE, LAST_PAUSE = 0.5, 30.0
CANCEL_SECONDS = 5.0

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that was settled when an evaluation was asked for. `queries`: ids of the examples that are left out in turn."""

    template: Any
    order: Order | None
    candidates: list[Candidate]
    weighing: Weighing
    cells: list[Cell]
    queries: list[str]


class EvaluationRunner:
    def __init__(self, services: Services) -> None:
        self._services = services
        self._evaluations = services.evaluations
        # of this life of this server
        self._holder = uuid.uuid4().hex
        self._working: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._working = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Whatever is under way is let go of, to be taken up behind its last finished cell."""
        if self._working is not None:
            await _end(self._working)
            await self._evaluations.release(self._holder)

    async def _work(self) -> None:
        while True:
            self._evaluations.added.clear()
            try:
                while (evaluation := await self._evaluations.claim(self._holder)) is not None:
                    await self._run(evaluation)
            except Exception:
                # the database is away, most likely: what was begun is still there when it is back
                logger.exception("evaluations are interrupted")
            with suppress(TimeoutError):
                # not wait_for, which may swallow a cancellation that comes with the event
                async with asyncio.timeout(POLL_SECONDS):
                    await self._evaluations.added.wait()

    async def _run(self, evaluation: Evaluation) -> None:
        running = _Running(evaluation, self._services, self._holder)
        working = asyncio.create_task(running.work())
        renewing = asyncio.create_task(running.renew())
        try:
            await asyncio.wait({working, renewing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _end(working, renewing)
        for task in (working, renewing):
            if not task.cancelled():
                task.result()


async def _end(*tasks: asyncio.Task[None]) -> None:
    """Cancelled, and again if need be: where a failure meets a cancellation, a task group raises the failure."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=CANCEL_SECONDS)


class _Running:
    """One evaluation under way."""

    def __init__(self, evaluation: Evaluation, services: Services, holder: str) -> None:
        self._evaluation = evaluation
        self._services = services
        self._holder = holder
        self._plan = msgspec.convert(evaluation.plan["settled"], Plan)
        self._queries_done = len(evaluation.cells) * len(self._plan.queries)

    async def renew(self) -> None:
        """Returns when this is no longer to be worked on: it was cancelled, deleted, or has another holder."""
        while await self._services.evaluations.renew(self._evaluation.id, self._holder, self._queries_done):
            await asyncio.sleep(RENEW_SECONDS)

    async def work(self) -> None:
        evaluations, name = self._services.evaluations, self._evaluation.id
        try:
            queries = await self._queries()
            for place, cell in enumerate(self._plan.cells):
                if place in self._evaluation.cells:
                    continue
                result = await self._cell(cell, queries)
                self._queries_done = (place + 1) * len(queries)
                if not await evaluations.finish_cell(name, self._holder, place, result, self._queries_done):
                    return
            await evaluations.finish(name, self._holder, "completed")
        except Unavailable:
            raise  # it is taken up again
        except ServerError as error:
            await self._fail(error)
        except Exception:
            logger.exception("an evaluation failed", extra={"evaluation": name})
            await self._fail(ServerError("internal error"))

    async def _fail(self, error: ServerError) -> None:
        name, shown = self._evaluation.id, {"code": error.code, "message": error.message}
        await self._services.evaluations.finish(name, self._holder, "failed", shown)

    async def _queries(self) -> list[Example]:
        found = await self._services.support_sets.get_version(self._evaluation.support_set, self._evaluation.version)
        by_id = {example.id: example for example in found.examples}
        return [by_id[name] for name in self._plan.queries]

    async def _cell(self, cell: Cell, queries: Sequence[Example]) -> dict[str, Any]:
        """Most queries a few at once, the last ones alone and by the clock."""
        timed = queries[-MAX_TIMED:]
        others, outcomes = iter(queries[: -len(timed)]), list[Outcome]()
        lanes = self._services.settings.evaluation_queries
        try:
            await together([self._lane(cell, others, outcomes) for _ in range(lanes)])
            await self._warm(timed)
            await self._lane(cell, iter(timed), outcomes, is_timed=True)
        except Unavailable:
            raise
        except ServerError as error:
            return failed_cell(cell, error.code, error.message)
        return cell_result(cell, outcomes, [candidate.label for candidate in self._plan.candidates])

    async def _lane(
        self, cell: Cell, queries: Iterator[Example], outcomes: list[Outcome], *, is_timed: bool = False
    ) -> None:
        for query in queries:
            outcomes.append(await _patiently(partial(self._outcome, cell, query, is_timed)))
            self._queries_done += 1

    async def _warm(self, queries: Sequence[Example]) -> None:
        """Have the media of these encoded, as those of the shots are by now."""
        names = [media for query in queries for media in query.media]
        media = await asyncio.to_thread(lambda: [self._services.store.find(name) for name in names])
        if media:
            await _patiently(partial(self._services.client.embed, media))

    async def _outcome(self, cell: Cell, query: Example, is_timed: bool) -> Outcome:
        began = time.monotonic()
        assembled = await assemble(self._fields(cell, query), self._services, without=[query.id])
        asking = Asking(request_id=self._evaluation.id, arrived=began, priority=PRIORITY)
        weighing = replace(self._plan.weighing, seed=cell.seed)
        found = await classify(assembled, self._plan.candidates, weighing, asking, self._services)
        return Outcome(
            truth=next(place for place, one in enumerate(self._plan.candidates) if one.label == truth_of(query)),
            probabilities=[one.probability for one in found.weighed],
            prompt_tokens=found.cost.prompt_tokens,
            cached_tokens=found.cost.cached_tokens,
            media=found.cost.media,
            media_encoded=found.cost.media_encoded,
            seconds=time.monotonic() - began if is_timed else None,
        )

    def _fields(self, cell: Cell, query: Example) -> FewShotFields:
        template = template_of(self._plan.template, self._services.model.config)
        shown = places(template.beginning)
        compares_text = "text" in SPACES.get(cell.strategy, ())
        return FewShotFields.model_validate(
            {
                "examples": {
                    "support_set": self._evaluation.support_set,
                    "version": self._evaluation.version,
                    "k": cell.k,
                    "strategy": cell.strategy,
                    "order": self._plan.order if cell.k else None,
                    "seed": cell.seed,
                },
                "query": {
                    "media": [_part(name) for name in query.media] if template.has_media else [],
                    "question": query.question if "question" in shown or compares_text else "",
                    "text": query.text if "text" in shown else "",
                },
                "template": self._plan.template,
            }
        )


def _part(media: str) -> dict[str, str]:
    kind = f"{kind_of(media)}_id"
    return {"type": kind, kind: media}


def truth_of(example: Example) -> str:
    """What an example counts as: its label, or, where it has none, its text."""
    return example.label or example.text


async def _patiently(ask: Callable[[], Awaitable[Result]]) -> Result:
    """The engine may be loading or being restarted: then it is asked again, with growing pauses."""
    pause = FIRST_PAUSE
    while True:
        try:
            return await ask()
        except Unavailable as error:
            logger.info("an evaluation waits", extra={"code": error.code, "pause_seconds": pause})
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE)
