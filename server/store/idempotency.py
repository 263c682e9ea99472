"""Requests with an `Idempotency-Key`: a repetition is answered like the first request, and changes nothing.

The answer is stored in the transaction that does the work, so either both are durable or neither is. A key counts
within a scope: the id of the support set that the request changes, or "" if it creates one.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from sqlalchemy import delete
from sqlalchemy.orm import Session

from server.errors import IdempotencyConflict
from server.store.database import Transaction
from server.store.records import SupportSetInfo
from server.store.tables import IdempotencyRow

RETENTION_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """The `Idempotency-Key` of a request; `digest` is that of the request's body."""

    key: str
    digest: str


def once(change: Transaction[SupportSetInfo], scope: str, key: IdempotencyKey) -> Transaction[SupportSetInfo]:
    """Return `change` as a transaction that takes effect once, and returns the first answer from then on.

    The transaction raises `IdempotencyConflict` if the key came with another request.
    """

    def transaction(session: Session, now: float) -> SupportSetInfo:
        answer = find(session, scope, key, now)
        if answer is None:
            answer = change(session, now)
            _add(session, scope, key, answer, now)
        return answer

    return transaction


def find(session: Session, scope: str, key: IdempotencyKey, now: float) -> SupportSetInfo | None:
    """Return the first answer. Raises `IdempotencyConflict` if the key came with another request."""
    row = session.get(IdempotencyRow, (scope, key.key))
    if row is None or row.created_at < now - RETENTION_SECONDS:
        return None
    if row.request_digest != key.digest:
        raise IdempotencyConflict("this Idempotency-Key was sent with a different request")
    return msgspec.convert(row.answer, SupportSetInfo)


def delete_old(session: Session, now: float) -> None:
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < now - RETENTION_SECONDS))


def _add(session: Session, scope: str, key: IdempotencyKey, info: SupportSetInfo, now: float) -> None:
    """Add the answer. The insert conflicts, as it must, if the same request was completed concurrently."""
    is_same = (IdempotencyRow.scope == scope, IdempotencyRow.key == key.key)
    session.execute(delete(IdempotencyRow).where(*is_same, IdempotencyRow.created_at < now - RETENTION_SECONDS))
    answer = msgspec.to_builtins(info)
    session.add(IdempotencyRow(scope=scope, key=key.key, request_digest=key.digest, answer=answer, created_at=now))
