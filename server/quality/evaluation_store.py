"""Evaluations in the database: what was asked, how far it is, and each finished cell, so that no finished work is lost.

A server that works on one holds it by a lease that it renews. When the server dies the lease runs out, and whichever
server is there then goes on behind the last finished cell. All methods leave the event loop free.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from sqlalchemy import JSON, ForeignKey, String, func, insert, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from server.errors import EvaluationNotFound, Overloaded
from server.store.database import Base, Database

ID_PREFIX = "eval_"
LEASE_SECONDS = 30.0
MAX_UNFINISHED = 64

Status = Literal["queued", "running", "completed", "failed", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("queued", "running")

Result = TypeVar("Result")


class EvaluationRow(Base):
    """`plan`: the request and all that was settled when it came; times are in Unix seconds. A support set may go while
    its evaluations stay."""

    __tablename__ = "evaluations"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    support_set: Mapped[str] = mapped_column(String(64), index=True)
    version: Mapped[int]
    status: Mapped[str] = mapped_column(String(16), index=True)
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)
    queries_done: Mapped[int]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    holder: Mapped[str] = mapped_column(String(64))
    held_until: Mapped[float]


class CellRow(Base):
    """`place`: of the cell in its evaluation's plan."""

    __tablename__ = "evaluation_cells"

    evaluation_id: Mapped[str] = mapped_column(ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True)
    place: Mapped[int] = mapped_column(primary_key=True)
    result: Mapped[dict[str, Any]] = mapped_column(JSON)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """`cells`: results by the place of their cell in the plan, the finished ones."""

    id: str
    support_set: str
    version: int
    status: Status
    plan: dict[str, Any]
    queries_done: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    error: dict[str, Any] | None
    cells: dict[int, dict[str, Any]]


class Evaluations:
    """`added` is set when there is something to work on that was not there before."""

    def __init__(self, database: Database) -> None:
        self.added = asyncio.Event()
        self._database = database

    # for clients

    async def create(self, support_set: str, version: int, plan: Mapping[str, Any]) -> Evaluation:
        """Raises `Overloaded` when too many wait already."""

        def add(session: Session, now: float) -> Evaluation:
            waiting = session.scalar(_count().where(EvaluationRow.status.in_(UNFINISHED))) or 0
            if waiting >= MAX_UNFINISHED:
                raise Overloaded(f"{waiting} evaluations wait already, the limit is {MAX_UNFINISHED}")
            row = EvaluationRow(
                id=_new_id(),
                support_set=support_set,
                version=version,
                status="queued",
                plan=dict(plan),
                queries_done=0,
                created_at=now,
                holder="",
                held_until=0.0,
            )
            session.add(row)
            session.flush()
            return _evaluation(row, {})

        created = await self._write(add)
        self.added.set()
        return created

    async def get(self, name: str) -> Evaluation:
        """Raises `EvaluationNotFound`."""
        return await self._read(lambda session, now: _evaluation(_find(session, name), _cells(session, name)))

    async def page(self, support_set: str | None, after: str, limit: int) -> list[Evaluation]:
        """The next ones behind the id `after`, in the order of their creation, without their cells."""
        query = select(EvaluationRow).where(EvaluationRow.id > after).order_by(EvaluationRow.id).limit(limit)
        if support_set is not None:
            query = query.where(EvaluationRow.support_set == support_set)
        return await self._read(lambda session, now: [_evaluation(row, {}) for row in session.scalars(query)])

    async def cancel(self, name: str) -> Evaluation:
        """What has ended already stays as it ended. Raises `EvaluationNotFound`."""

        def end(session: Session, now: float) -> Evaluation:
            row = _find(session, name, lock=True)
            if row.status in UNFINISHED:
                row.status, row.finished_at = "cancelled", now
            session.flush()
            return _evaluation(row, _cells(session, name))

        return await self._write(end)

    async def delete(self, name: str) -> None:
        """Raises `EvaluationNotFound`."""

        def remove(session: Session, now: float) -> None:
            session.delete(_find(session, name, lock=True))

        await self._write(remove)

    # for who works on them

    async def claim(self, holder: str) -> Evaluation | None:
        """The oldest that nobody works on, held from now on; None: there is none."""

        def take(session: Session, now: float) -> Evaluation | None:
            free = (EvaluationRow.status.in_(UNFINISHED), EvaluationRow.held_until <= now)
            query = select(EvaluationRow).where(*free).order_by(EvaluationRow.id).limit(1)
            row = session.scalar(query.with_for_update(skip_locked=True))
            if row is None:
                return None
            row.status, row.holder, row.held_until = "running", holder, now + LEASE_SECONDS
            row.started_at = row.started_at or now
            session.flush()
            return _evaluation(row, _cells(session, row.id))

        return await self._write(take)

    async def renew(self, name: str, holder: str, queries_done: int) -> bool:
        """Whether it is still to be worked on by this holder."""

        def extend(session: Session, now: float) -> bool:
            values = {"held_until": now + LEASE_SECONDS, "queries_done": queries_done}
            return _change(session, name, holder, values)

        return await self._write(extend)

    async def finish_cell(
        self, name: str, holder: str, place: int, result: Mapping[str, Any], queries_done: int
    ) -> bool:
        """False, and nothing is kept, when it is no longer this holder's to work on."""

        def keep(session: Session, now: float) -> bool:
            values = {"held_until": now + LEASE_SECONDS, "queries_done": queries_done}
            is_held = _change(session, name, holder, values)
            if is_held:
                session.execute(insert(CellRow).values(evaluation_id=name, place=place, result=dict(result)))
            return is_held

        return await self._write(keep)

    async def finish(self, name: str, holder: str, status: Status, error: Mapping[str, Any] | None = None) -> None:
        await self._write(
            lambda session, now: _change(
                session, name, holder, {"status": status, "finished_at": now, "error": error, "held_until": 0.0}
            )
        )

    async def let_go(self, holder: str) -> None:
        """Stop working on what this holder has before its end: another, or its next life, may go on at once."""
        where = (EvaluationRow.holder == holder, EvaluationRow.status == "running")
        await self._write(
            lambda session, now: session.execute(update(EvaluationRow).where(*where).values(held_until=0))
        )

    async def _read(self, work: Callable[[Session, float], Result]) -> Result:
        return await asyncio.to_thread(self._database.read, lambda session: work(session, time.time()))

    async def _write(self, work: Callable[[Session, float], Result]) -> Result:
        """What has begun is waited for, also when it is cancelled: no write comes after its caller has gone."""
        write = partial(self._database.write, lambda session: work(session, time.time()))
        writing = asyncio.ensure_future(asyncio.to_thread(write))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})
            raise


def _new_id() -> str:
    """In the order of time, so that a list by id is a list by age."""
    return f"{ID_PREFIX}{time.time_ns() // 1_000_000:012x}{uuid.uuid4().hex[:16]}"


def _count() -> Any:
    return select(func.count()).select_from(EvaluationRow)


def _find(session: Session, name: str, *, lock: bool = False) -> EvaluationRow:
    row = session.get(EvaluationRow, name, with_for_update=lock or None)
    if row is None:
        raise EvaluationNotFound(f"there is no evaluation {name[:80]!r}")
    return row


def _cells(session: Session, name: str) -> dict[int, dict[str, Any]]:
    rows = session.scalars(select(CellRow).where(CellRow.evaluation_id == name).order_by(CellRow.place))
    return {row.place: row.result for row in rows}


def _change(session: Session, name: str, holder: str, values: Mapping[str, Any]) -> bool:
    where = (EvaluationRow.id == name, EvaluationRow.holder == holder, EvaluationRow.status == "running")
    changed = session.execute(update(EvaluationRow).where(*where).values(**values))
    return bool(changed.rowcount)  # type: ignore[attr-defined]


def _evaluation(row: EvaluationRow, cells: dict[int, dict[str, Any]]) -> Evaluation:
    status: Status = row.status  # type: ignore[assignment]
    return Evaluation(
        id=row.id,
        support_set=row.support_set,
        version=row.version,
        status=status,
        plan=row.plan,
        queries_done=row.queries_done,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        error=row.error,
        cells=cells,
    )
