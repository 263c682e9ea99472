"""What only PostgreSQL has: connections that only read."""

from __future__ import annotations

import pytest
from sqlalchemy import insert, text
from sqlalchemy.orm import Session

from server.errors import DatabaseUnavailable
from server.store.database import Database
from server.store.records import EmbeddingRow

pytestmark = pytest.mark.anyio


def put(session: Session, now: float) -> None:
    session.execute(insert(EmbeddingRow).values(key="a", model="m", vector=b"", created_at=0.0))


async def test_a_connection_that_only_reads_is_unavailable_and_replaced(another_schema: str) -> None:
    database = Database(another_schema)

    def restrict(session: Session, now: float) -> None:
        """Leave a connection in the pool like one that was made while the database was read-only."""
        session.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))

    await database.write(restrict)
    with pytest.raises(DatabaseUnavailable, match=r"^the database cannot be written: it is read-only$"):
        await database.write(put)
    await database.write(put)
    database.close()
