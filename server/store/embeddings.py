"""Embeddings of media and texts in the database, computed once for all servers that share it.

A row holds a float32 vector under the key of its input and the fingerprint of the weights that computed it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from server.store.database import Database, chunked
from server.store.records import EmbeddingRow

# older vectors are computed again: their weights or texts may no longer be in use
RETENTION_SECONDS = 30 * 24 * 3600.0

Vector = NDArray[np.float32]


class EmbeddingStore:
    """`keys` are media ids or digests of texts; `model` is the fingerprint of the weights."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, keys: Iterable[str], model: str) -> dict[str, Vector]:
        """Return the stored vectors [D] of these keys."""
        unique = list(dict.fromkeys(keys))
        return await self._database.read(lambda session, now: _vectors(session, unique, model))

    async def put(self, vectors: Mapping[str, Vector], model: str) -> None:
        """Add vectors [D]; those that are stored already stay."""

        def add(session: Session, now: float) -> None:
            stored = _vectors(session, list(vectors), model)
            rows = [
                {"key": key, "model": model, "vector": vector.astype("<f4").tobytes(), "created_at": now}
                for key, vector in vectors.items()
                if key not in stored
            ]
            if rows:
                session.execute(insert(EmbeddingRow), rows)

        await self._database.write(add)

    async def sweep(self) -> None:
        """Delete vectors that are older than `RETENTION_SECONDS`."""
        await self._database.write(
            lambda session, now: session.execute(
                delete(EmbeddingRow).where(EmbeddingRow.created_at < now - RETENTION_SECONDS)
            )
        )


def _vectors(session: Session, keys: Sequence[str], model: str) -> dict[str, Vector]:
    vectors: dict[str, Vector] = {}
    for chunk in chunked(keys):
        query = select(EmbeddingRow.key, EmbeddingRow.vector)
        rows = session.execute(query.where(EmbeddingRow.model == model, EmbeddingRow.key.in_(chunk)))
        vectors.update((key, np.frombuffer(vector, dtype="<f4")) for key, vector in rows)
    return vectors
