"""Embeddings in the database: exact, per model, and deleted when they are old or their media are deleted."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from server.fewshot.retrieval import RETENTION_SECONDS, EmbeddingStore
from server.store.database import Database
from server.store.records import EmbeddingRow
from server.store.retention import delete_some_old
from server.store.support_sets import SupportSets
from tests.server.store.conftest import RED, Clock, example

pytestmark = pytest.mark.anyio


async def test_embeddings_are_stored_by_model_and_deleted_with_their_media(
    embeddings: EmbeddingStore, support_sets: SupportSets, clock: Clock
) -> None:
    vectors = {RED.id: np.array([0.5, -1.25, 3e-8], np.float32), "text": np.ones(3, np.float32)}
    await support_sets.create("s", [example("a", RED)])
    await embeddings.put(vectors, "model-a")
    await embeddings.put({**vectors, "new": np.zeros(3, np.float32)}, "model-a")
    stored = await embeddings.get([RED.id, "text", "other"], "model-a")
    assert stored.keys() == vectors.keys()
    for key, vector in vectors.items():
        assert stored[key].dtype == np.float32
        assert stored[key].tobytes() == vector.tobytes()
    assert await embeddings.get([RED.id], "model-b") == {}
    await support_sets.delete("s")
    await support_sets.sweep()
    assert (await embeddings.get([RED.id, "text"], "model-a")).keys() == {"text"}
    clock.now += 100 * 24 * 3600
    await embeddings.put({"text": vectors["text"]}, "model-b")
    await embeddings.sweep()
    assert await embeddings.get(["text"], "model-a") == {}
    assert (await embeddings.get(["text"], "model-b")).keys() == {"text"}


async def test_old_embeddings_are_deleted_a_thousand_at_a_time(
    embeddings: EmbeddingStore, database: Database, clock: Clock
) -> None:
    """Other writers of SQLite wait for each transaction."""
    keys = [f"key {i}" for i in range(2500)]
    await embeddings.put({key: np.zeros(1, np.float32) for key in keys}, "m")
    clock.now += 100 * 24 * 3600
    assert await database.write(partial(delete_some_old, EmbeddingRow, RETENTION_SECONDS)) == 1000
    assert len(await embeddings.get(keys, "m")) == 1500
    await embeddings.sweep()
    assert await embeddings.get(keys, "m") == {}


async def test_more_keys_than_fit_into_one_statement(embeddings: EmbeddingStore) -> None:
    keys = [f"key {i}" for i in range(2500)]
    await embeddings.put({key: np.zeros(1, np.float32) for key in keys}, "m")
    assert len(await embeddings.get(keys, "m")) == 2500
