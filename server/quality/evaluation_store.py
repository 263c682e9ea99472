"""Evaluations in the database: their plan, their progress, and the result of each finished cell.

A server that runs one holds it by a lease, which it renews. If the server dies, the lease expires, and another server
resumes after the last finished cell, so no finished work is lost. The interruptions of a cell are counted, since the cell
may be the cause. A server that lives, and was only cut off from the database, takes its own interruption back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Update, func, or_, select, true, update
from sqlalchemy.orm import Session, aliased

from server.access.tenants import DEFAULT_TENANT
from server.errors import EvaluationNotFound, Overloaded
from server.limits.shared_limit import SharedLimit
from server.quality.evaluation_records import (
    HEAD,
    UNFINISHED,
    CellRow,
    Evaluation,
    EvaluationHead,
    EvaluationRow,
    Status,
    with_cells,
    without_cells,
)
from server.store.database import Database, new_id

ID_PREFIX = "eval_"
LEASE_SECONDS = 30.0
MAX_UNFINISHED = 64
# a client that was refused is refused for as long, so that a refusal costs less than the request, and reads no support set
REFUSED_SECONDS = 1.0


@dataclass(slots=True)
class Changes:
    """A count of this process's changes to the completed evaluations: one when a change begins, one when it ends."""

    number: int = 0

    @contextmanager
    def change(self) -> Iterator[None]:
        self.number += 1  # what is read from now on may be new, although the change may not have returned yet
        try:
            yield
        finally:
            self.number += 1


class Evaluations:
    """The evaluations of a tenant in a database. `added` is set when this process has added one for any tenant.

    One client has at most `max_share` of the room, as in `SharedLimit`. `model` is the name of the model that evaluates, if
    others evaluate in the same database.
    """

    def __init__(self, database: Database, model: str | None = None, *, max_share: float = 1.0) -> None:
        self.added = asyncio.Event()
        self.changes = Changes()
        self._database = database
        self._model = model
        self._max_share = max_share
        self._tenant = DEFAULT_TENANT
        self._refused: dict[str, tuple[Overloaded, float]] = {}  # by client: the refusal, and until when it holds
        # by holder: the evaluation that it claimed last, and the number of its cells that were finished when it last had it
        self._claimed: dict[str, tuple[str, int]] = {}

    def of(self, tenant: str) -> Evaluations:
        """Return the evaluations of a tenant; the room for unfinished ones is shared by all."""
        evaluations = copy(self)
        evaluations._tenant = tenant
        return evaluations

    # for clients

    def check_room(self, client: str) -> None:
        """Refuse an evaluation before any work for it, if the client was refused just now. Raises what `create` raises."""
        refusal, until = self._refused.get(client, (None, 0.0))
        if refusal is not None and time.monotonic() < until:
            raise type(refusal)(refusal.message)

    async def create(self, support_set: str, version: int, plan: Mapping[str, Any], client: str = "") -> Evaluation:
        """Queue an evaluation. Raises `Overloaded` and `ClientOverShare` if too many are unfinished."""

        def add(session: Session, now: float) -> Evaluation:
            self._check_room_of(client, session.scalars(clients).all())
            row = EvaluationRow(
                id=new_id(ID_PREFIX, session.scalar(select(func.max(EvaluationRow.id)))),
                support_set=support_set,
                version=version,
                status="queued",
                plan=dict(plan) if self._model is None else {**plan, "model": self._model},
                created_at=now,
                client=client,
                tenant=self._tenant,
            )
            session.add(row)
            session.flush()
            return without_cells(row)

        clients = select(EvaluationRow.client).where(EvaluationRow.status.in_(UNFINISHED))
        self.check_room(client)
        try:
            evaluation = await self._database.write(add)
        except Overloaded as refusal:
            now = time.monotonic()
            for name in [name for name, (_, until) in self._refused.items() if until <= now]:
                del self._refused[name]
            self._refused[client] = (refusal, now + REFUSED_SECONDS)
            raise
        self.added.set()
        return evaluation

    def _check_room_of(self, client: str, clients: Iterable[str]) -> None:
        """Check that `client` may have one more evaluation next to the unfinished ones of `clients`."""
        room = SharedLimit(MAX_UNFINISHED, self._max_share, "evaluations that may be unfinished")
        for other in clients:
            room.take(other)
        room.check(client)

    async def get(self, evaluation_id: str) -> Evaluation:
        """Return an evaluation with its cells. Raises `EvaluationNotFound`."""
        return await self._database.read(lambda session, now: with_cells(session, self._find(session, evaluation_id)))

    async def latest(self, support_set: str, version: int) -> Evaluation | None:
        """Return the completed evaluation of a version by this model that was created last, with its cells, if any."""
        query = select(EvaluationRow).where(
            EvaluationRow.support_set == support_set,
            EvaluationRow.version == version,
            EvaluationRow.status == "completed",
            self._is_ours(),
        )
        newest = query.order_by(EvaluationRow.id.desc()).limit(1)

        def find(session: Session, now: float) -> Evaluation | None:
            row = session.scalar(newest)
            return None if row is None else with_cells(session, row)

        return await self._database.read(find)

    async def page(self, support_set: str | None, after: str, limit: int) -> list[EvaluationHead]:
        """Return the evaluations that were created after the one with the id `after`, oldest first."""
        is_listed = (EvaluationRow.tenant == self._tenant, EvaluationRow.id > after)
        query = select(*HEAD.values()).where(*is_listed).order_by(EvaluationRow.id).limit(limit)
        if support_set is not None:
            query = query.where(EvaluationRow.support_set == support_set)
        rows = await self._database.read(lambda session, now: session.execute(query).all())
        return [EvaluationHead(**dict(zip(HEAD, row, strict=True))) for row in rows]

    async def num_unfinished(self) -> dict[str, int]:
        """Return how many evaluations of all tenants are queued, and how many run, on all servers of the database."""
        query = select(EvaluationRow.status, func.count()).where(EvaluationRow.status.in_(UNFINISHED))
        by_status = query.group_by(EvaluationRow.status)
        rows = await self._database.read(lambda session, now: session.execute(by_status).all())
        return dict.fromkeys(UNFINISHED, 0) | dict(rows)

    async def cancel(self, evaluation_id: str) -> Evaluation:
        """Cancel an evaluation, unless it has finished already. Raises `EvaluationNotFound`."""

        def end(session: Session, now: float) -> Evaluation:
            row = self._find(session, evaluation_id, lock=True)
            if row.status in UNFINISHED:
                row.status, row.finished_at = "cancelled", now
            session.flush()
            return with_cells(session, row)

        evaluation = await self._database.write(end)
        self._refused.clear()
        return evaluation

    async def delete(self, evaluation_id: str) -> None:
        """Delete an evaluation with its cells. Raises `EvaluationNotFound`."""
        # one that does not exist is no change, after which all recommendations would be read again
        await self._database.read(lambda session, now: self._find(session, evaluation_id))
        with self.changes.change():
            await self._database.write(
                lambda session, now: session.delete(self._find(session, evaluation_id, lock=True))
            )
        self._refused.clear()

    def _find(self, session: Session, evaluation_id: str, *, lock: bool = False) -> EvaluationRow:
        row = None
        if "\0" not in evaluation_id:  # PostgreSQL rejects such a parameter
            row = session.get(EvaluationRow, evaluation_id, with_for_update=lock or None)
        if row is None or row.tenant != self._tenant:
            raise EvaluationNotFound(f"no evaluation {evaluation_id[:80]!r}")
        return row

    # for the server that runs those of all tenants

    def _is_ours(self) -> ColumnElement[bool]:
        """Select the evaluations by this model; those of a server with a single model name none, and are anyone's."""
        name = EvaluationRow.plan["model"].as_string()
        return true() if self._model is None else or_(name.is_(None), name == self._model)

    async def claim(self, holder: str) -> Evaluation | None:
        """Lease an unfinished evaluation by this model that no server holds, if any. A holder runs one at a time.

        The one that this holder has not finished comes first, then those that were interrupted; then support sets take
        turns, and each begins its oldest evaluation.
        """
        other = aliased(EvaluationRow)
        last_start = select(func.max(other.started_at)).where(other.support_set == EvaluationRow.support_set)
        turn = func.coalesce(last_start.scalar_subquery(), 0.0)

        def take(session: Session, now: float) -> Evaluation | None:
            session.execute(_take_back(*self._claimed.get(holder, ("", 0)), holder))
            until = EvaluationRow.held_until
            # one that ends that late was taken before a clock was set back; those of servers may differ a little
            is_free = or_(until <= now, until > now + 2 * LEASE_SECONDS, EvaluationRow.holder == holder)
            is_claimable = (EvaluationRow.status.in_(UNFINISHED), is_free, self._is_ours())
            order = (EvaluationRow.holder != holder, EvaluationRow.started_at.is_(None), turn, EvaluationRow.id)
            query = select(EvaluationRow).where(*is_claimable).order_by(*order).limit(1)
            row = session.scalar(query.with_for_update(skip_locked=True))
            if row is None:
                return None
            # a lease that was neither released nor taken by its own holder again: the server died, or was cut off
            row.interruptions += row.held_until > 0 and row.holder != holder
            row.status, row.holder, row.held_until = "running", holder, now + LEASE_SECONDS
            row.started_at, row.seconds_left = row.started_at or now, None
            session.flush()
            return with_cells(session, row)

        evaluation = await self._database.write(take)
        self.forget(holder)
        if evaluation is not None:
            self._claimed[holder] = (evaluation.id, len(evaluation.cells))
        return evaluation

    def forget(self, holder: str) -> None:
        """Forget what a holder has claimed: its interruption, if there is one, is never taken back."""
        self._claimed.pop(holder, None)

    async def renew(
        self, evaluation_id: str, holder: str, queries_done: int, seconds_left: float | None = None
    ) -> bool:
        """Renew the lease and record progress; return False if this holder no longer has the lease."""
        return await self._database.write(
            lambda session, now: _renew(session, evaluation_id, holder, queries_done, now, seconds_left=seconds_left)
        )

    async def finish_cell(
        self, evaluation_id: str, holder: str, index: int, result: Mapping[str, Any], queries_done: int
    ) -> bool:
        """Store the result of a cell; return False, and store nothing, if this holder no longer has the lease.

        The cell may exist: a hung PostgreSQL may commit a transaction after the evaluation was claimed again.
        """

        def store(session: Session, now: float) -> bool:
            is_held = _renew(session, evaluation_id, holder, queries_done, now, interruptions=0)
            if is_held:
                session.merge(CellRow(evaluation_id=evaluation_id, index=index, result=dict(result)))
            return is_held

        is_held = await self._database.write(store)
        if is_held and holder in self._claimed:
            self._claimed[holder] = (evaluation_id, self._claimed[holder][1] + 1)
        return is_held

    async def finish(
        self,
        evaluation_id: str,
        holder: str,
        status: Status,
        queries_done: int,
        error: Mapping[str, Any] | None = None,
    ) -> None:
        """End an evaluation, unless this holder no longer has the lease.

        The progress is written once more: a renewal with an earlier number may have been committed after the last cell.
        """
        end: dict[str, Any] = {"status": status, "error": error, "held_until": 0.0, "queries_done": queries_done}
        with self.changes.change():
            await self._database.write(
                lambda session, now: _change(session, evaluation_id, holder, finished_at=now, **end)
            )
        self._refused.clear()

    async def release(self, holder: str) -> None:
        """End the leases of this holder: another server, or this one after a restart, may resume at once."""
        is_held = (EvaluationRow.holder == holder, EvaluationRow.status == "running")
        end = update(EvaluationRow).where(*is_held).values(held_until=0, seconds_left=None)
        await self._database.write(lambda session, now: session.execute(end))


def _take_back(evaluation_id: str, num_cells: int, holder: str) -> Update:
    """Return the statement that takes back the interruption by a holder whose evaluation another one has claimed.

    If the other one has finished a cell, it has done so already: interruptions that are counted now are not this holder's.
    """
    is_lost = (EvaluationRow.id == evaluation_id, EvaluationRow.status == "running", EvaluationRow.holder != holder)
    finished = select(func.count()).select_from(CellRow).where(CellRow.evaluation_id == evaluation_id).scalar_subquery()
    counted = update(EvaluationRow).where(*is_lost, EvaluationRow.interruptions > 0, finished == num_cells)
    return counted.values(interruptions=EvaluationRow.interruptions - 1)


def _renew(session: Session, evaluation_id: str, holder: str, queries_done: int, now: float, **changes: Any) -> bool:
    until = now + LEASE_SECONDS
    return _change(session, evaluation_id, holder, held_until=until, queries_done=queries_done, **changes)


def _change(session: Session, evaluation_id: str, holder: str, **values: Any) -> bool:
    """Change a running evaluation; return False if this holder no longer has the lease."""
    is_held = (EvaluationRow.id == evaluation_id, EvaluationRow.holder == holder, EvaluationRow.status == "running")
    changed = session.execute(update(EvaluationRow).where(*is_held).values(**values))
    return bool(changed.rowcount)  # type: ignore[attr-defined]
