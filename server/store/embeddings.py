"""Embeddings of media and texts, cached in the database: computed once for all servers that share it.

A row is a vector of float32 under what was embedded and the fingerprint of the weights that embedded it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from server.store.tables import EmbeddingRow

# then it is computed again: the weights, or the texts, may be long gone
KEPT_SECONDS = 30 * 24 * 3600.0
# parameters of one statement: SQLite takes 32766
MAX_PARAMETERS = 1000


def get(session: Session, keys: Sequence[str], model: str) -> dict[str, NDArray[np.float32]]:
    found: dict[str, NDArray[np.float32]] = {}
    for start in range(0, len(keys), MAX_PARAMETERS):
        some = keys[start : start + MAX_PARAMETERS]
        query = select(EmbeddingRow.key, EmbeddingRow.vector)
        rows = session.execute(query.where(EmbeddingRow.model == model, EmbeddingRow.key.in_(some)))
        found.update((key, np.frombuffer(vector, dtype="<f4")) for key, vector in rows)
    return found


def put(session: Session, vectors: Mapping[str, NDArray[np.float32]], model: str, now: float) -> None:
    """What is there already stays."""
    known = get(session, list(vectors), model)
    new = [
        {"key": key, "model": model, "vector": vector.astype("<f4").tobytes(), "created_at": now}
        for key, vector in vectors.items()
        if key not in known
    ]
    if new:
        session.execute(insert(EmbeddingRow), new)


def forget(session: Session, now: float) -> None:
    session.execute(delete(EmbeddingRow).where(EmbeddingRow.created_at < now - KEPT_SECONDS))
