"""Requests that may come again under an `Idempotency-Key`, and are then answered as the first time, with nothing done.

The answer is kept in the transaction that did the work: either both are there or neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from sqlalchemy import delete
from sqlalchemy.orm import Session

from server.errors import IdempotencyConflict
from server.fewshot.examples import SupportSetInfo
from server.fewshot.tables import FirstAnswerRow

KEPT_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Repeatable:
    """`digest`: of the request's body. `scope`: the support set that it would change, "": it makes one."""

    key: str
    digest: str


def find(session: Session, scope: str, repeatable: Repeatable | None, now: float) -> SupportSetInfo | None:
    """Raises `IdempotencyConflict` when the key came with another request."""
    if repeatable is None:
        return None
    row = session.get(FirstAnswerRow, (scope, repeatable.key))
    if row is None or row.created_at < now - KEPT_SECONDS:
        return None
    if row.request_digest != repeatable.digest:
        raise IdempotencyConflict("another request was made with this Idempotency-Key")
    return msgspec.convert(row.answer, SupportSetInfo)


def keep(session: Session, scope: str, repeatable: Repeatable | None, info: SupportSetInfo, now: float) -> None:
    """Fails, as it must, where the same request was done side by side."""
    if repeatable is None:
        return
    same = (FirstAnswerRow.scope == scope, FirstAnswerRow.key == repeatable.key)
    session.execute(delete(FirstAnswerRow).where(*same, FirstAnswerRow.created_at < now - KEPT_SECONDS))
    answer = msgspec.to_builtins(info)
    session.add(
        FirstAnswerRow(scope=scope, key=repeatable.key, request_digest=repeatable.digest, answer=answer, created_at=now)
    )


def forget(session: Session, now: float) -> None:
    session.execute(delete(FirstAnswerRow).where(FirstAnswerRow.created_at < now - KEPT_SECONDS))
