"""Requests that may come again under an `Idempotency-Key`, and are then answered as the first time, with nothing done.

The answer is kept in the transaction that did the work: either both are there or neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from sqlalchemy import delete
from sqlalchemy.orm import Session

from server.errors import IdempotencyConflict
from server.store.records import SupportSetInfo
from server.store.tables import IdempotencyRow

KEPT_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """`digest`: of the request's body. `scope`: the support set that it would change, "": it makes one."""

    key: str
    digest: str


def find(session: Session, scope: str, key: IdempotencyKey | None, now: float) -> SupportSetInfo | None:
    """Raises `IdempotencyConflict` when the key came with another request."""
    if key is None:
        return None
    row = session.get(IdempotencyRow, (scope, key.key))
    if row is None or row.created_at < now - KEPT_SECONDS:
        return None
    if row.request_digest != key.digest:
        raise IdempotencyConflict("another request was made with this Idempotency-Key")
    return msgspec.convert(row.answer, SupportSetInfo)


def keep(session: Session, scope: str, key: IdempotencyKey | None, info: SupportSetInfo, now: float) -> None:
    """Fails, as it must, where the same request was done side by side."""
    if key is None:
        return
    same = (IdempotencyRow.scope == scope, IdempotencyRow.key == key.key)
    session.execute(delete(IdempotencyRow).where(*same, IdempotencyRow.created_at < now - KEPT_SECONDS))
    answer = msgspec.to_builtins(info)
    session.add(IdempotencyRow(scope=scope, key=key.key, request_digest=key.digest, answer=answer, created_at=now))


def forget(session: Session, now: float) -> None:
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < now - KEPT_SECONDS))
