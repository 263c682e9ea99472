"""Deletes the rows of a table that are older than its retention, a few per transaction: other writers do not wait."""

from __future__ import annotations

from functools import partial

from sqlalchemy import delete, select, tuple_
from sqlalchemy.orm import Session

from server.store.database import Database
from server.store.records import EmbeddingRow, FitRow, IdempotencyRow

ROWS_PER_TRANSACTION = 1000

# the tables whose rows have a time
Aging = type[EmbeddingRow] | type[FitRow] | type[IdempotencyRow]


async def delete_old(database: Database, table: Aging, seconds: float) -> None:
    """Delete the rows of all tenants that are older than `seconds`. Raises `DatabaseUnavailable`."""
    await database.sweep(partial(delete_some_old, table, seconds))


def delete_some_old(table: Aging, seconds: float, session: Session, now: float) -> int:
    """Delete up to `ROWS_PER_TRANSACTION` old rows, and return their number, 0 if there are none."""
    key = [*table.__table__.primary_key]
    old = select(*key).where(table.created_at < now - seconds).limit(ROWS_PER_TRANSACTION)
    return len(session.scalars(delete(table).where(tuple_(*key).in_(old)).returning(key[0])).all())
