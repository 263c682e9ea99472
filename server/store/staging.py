"""Stores the examples of a large request in several short transactions; readers see them only after the last one.

While SQLite writes, all other writers wait. So a large request first stores most of its examples in a set without a
version. The transaction that creates the version stores the last examples and publishes all. If a writer dies, such a set
expires, and is deleted like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from sqlalchemy import delete
from sqlalchemy.orm import Session

from server.errors import DatabaseUnavailable
from server.store import versions
from server.store.database import Database, new_id
from server.store.media_references import LEASE_SECONDS, LeaseLost
from server.store.records import NewExample, SupportSetRow

ID_PREFIX = "ss_"
# examples that are stored in one transaction, for which other writers wait
EXAMPLES_PER_TRANSACTION = 250


class Staging:
    """The examples of one request; `set_id` is the set without a version that holds them until they are published."""

    def __init__(self, database: Database, tenant: str, examples: Sequence[NewExample]) -> None:
        self.set_id = new_id(ID_PREFIX)
        self._database = database
        self._tenant = tenant
        self._examples = examples
        *self._early, self._last = range(0, max(len(examples), 1), EXAMPLES_PER_TRANSACTION)

    async def store(self) -> None:
        """Store all examples except the last ones; their media are leased. Examples of an earlier attempt are deleted."""
        await self.discard()
        for start in self._early:
            await self._database.write(partial(self._store_part, start))

    def finish(self, session: Session, now: float) -> SupportSetRow:
        """Store the last examples, and return the row of the set that holds all. Raises `LeaseLost` if it has expired."""
        return self._store_part(self._last, session, now)

    async def discard(self) -> None:
        """Delete the unpublished examples; if the database is unavailable, they expire."""
        if self._early:
            unpublished = delete(SupportSetRow).where(SupportSetRow.id == self.set_id, SupportSetRow.version == 0)
            with suppress(DatabaseUnavailable):
                await self._database.write(lambda session, now: session.execute(unpublished))

    def _store_part(self, start: int, session: Session, now: float) -> SupportSetRow:
        row = self._create(session, now) if start == 0 else self._find(session, now)
        versions.insert(session, row, self._examples[start : start + EXAMPLES_PER_TRANSACTION])
        return row

    def _create(self, session: Session, now: float) -> SupportSetRow:
        row = SupportSetRow(
            id=self.set_id,
            version=0,
            created_at=now,
            updated_at=now,
            expires_at=now + LEASE_SECONDS,
            is_pinned=False,
            next_position=0,
            metadata_={},
            tenant=self._tenant,
        )
        session.add(row)
        session.flush()
        return row

    def _find(self, session: Session, now: float) -> SupportSetRow:
        row = session.get(SupportSetRow, self.set_id, with_for_update=True)
        if row is None or row.expires_at is None or row.expires_at <= now:
            raise LeaseLost
        return row
