"""Evaluations as rows and as frozen records: a plan, its progress, and the results of its finished cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
from sqlalchemy import JSON, ColumnElement, ForeignKey, String, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from server.fewshot.methods import IN_CONTEXT
from server.store.database import Base

Status = Literal["queued", "running", "completed", "failed", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("queued", "running")
# what the results of cells lack that were stored before there were other methods and controls, and temperatures
OLD_CELL = {"method": IN_CONTEXT, "control": None}
OLD_RESULTS = {"temperature": 1.0, "curve": []}


class EvaluationRow(Base):
    """An evaluation, which outlives its support set; `plan` is the request and what was derived from it on arrival."""

    __tablename__ = "evaluations"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    support_set: Mapped[str] = mapped_column(String(64), index=True)
    version: Mapped[int]
    status: Mapped[str] = mapped_column(String(16), index=True)
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)
    queries_done: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    holder: Mapped[str] = mapped_column(String(64), default="")
    held_until: Mapped[float] = mapped_column(default=0.0)
    client: Mapped[str] = mapped_column(String(128), server_default="")
    interruptions: Mapped[int] = mapped_column(default=0, server_default="0")  # since the last finished cell
    tenant: Mapped[str] = mapped_column(String(48), server_default="", index=True)
    seconds_left: Mapped[float | None]


class CellRow(Base):
    """The result of a finished cell. `index` is that of the cell in the evaluation's plan."""

    __tablename__ = "evaluation_cells"

    evaluation_id: Mapped[str] = mapped_column(ForeignKey("evaluations.id", ondelete="CASCADE"), primary_key=True)
    index: Mapped[int] = mapped_column("place", primary_key=True)
    result: Mapped[dict[str, Any]] = mapped_column(JSON)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationHead:
    """An evaluation without its plan, which may take megabytes, and without its results."""

    id: str
    support_set: str
    version: int
    status: Status
    queries_done: int
    created_at: float
    started_at: float | None
    finished_at: float | None
    error: dict[str, Any] | None
    seconds_left: float | None
    num_cells: int = 0
    num_queries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(EvaluationHead):
    """An evaluation without the database. `cells` are the results of the finished cells, by index in the plan."""

    plan: dict[str, Any]
    tenant: str
    interruptions: int
    cells: dict[int, dict[str, Any]] = field(default_factory=dict)


def _length(part: str) -> ColumnElement[int]:
    """Return the length of a list in a plan, of which the database returns nothing else."""
    return func.coalesce(func.json_array_length(EvaluationRow.plan["settled", part]), 0)


# the columns of the fields of a head
LENGTHS = {"num_cells": _length("cells"), "num_queries": _length("queries")}
HEAD: dict[str, Any] = {
    name: LENGTHS.get(name, getattr(EvaluationRow, name, None)) for name in EvaluationHead.__dataclass_fields__
}


def with_cells(session: Session, row: EvaluationRow) -> Evaluation:
    """Return the record of a row, with its results."""
    cells = session.scalars(select(CellRow).where(CellRow.evaluation_id == row.id).order_by(CellRow.index))
    completed = {cell.index: _with_form(_completed(cell.result), row.plan) for cell in cells}
    return replace(without_cells(row), cells=completed)


def _completed(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a cell with the fields that it lacks if it is old."""
    return OLD_CELL | (OLD_RESULTS if result["status"] == "completed" else {}) | result


def without_cells(row: EvaluationRow) -> Evaluation:
    """Return the record of a row, without its results."""
    evaluation = msgspec.convert(row, Evaluation, from_attributes=True)
    settled = row.plan.get("settled", {})
    cells = [_with_form(cell, row.plan) for cell in settled.get("cells", ())]
    plan = {**row.plan, "settled": {**settled, "cells": cells}}
    return replace(evaluation, plan=plan, num_cells=len(cells), num_queries=len(settled.get("queries", ())))


def _with_form(cell: dict[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell with its form. If it is old, it has none: all prompts with shots have the form of their plan."""
    k, form = cell.get("k"), plan.get("settled", {}).get("shots_attend", "previous")
    return {"shots_attend": None if k is None else form if k else "previous"} | cell
