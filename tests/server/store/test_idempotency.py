"""A request with an `Idempotency-Key` takes effect once; its repetitions get the first answer."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from sqlalchemy import select

from server.errors import IdempotencyConflict, SupportSetNotFound
from server.media.store import MediaStore
from server.store import retention
from server.store import support_sets as support_sets_module
from server.store.database import Database
from server.store.records import IdempotencyRow
from server.store.support_sets import RETENTION_SECONDS, IdempotencyKey, SupportSets
from tests.server.store.conftest import RED, Clock, example

pytestmark = pytest.mark.anyio


async def test_a_repeated_request_gets_the_first_answer(support_sets: SupportSets, clock: Clock) -> None:
    once = IdempotencyKey("key-1", "digest")
    first = await support_sets.create("s", [example("a", RED)], idempotency_key=once)
    added = await support_sets.put_examples("s", [example("b")], idempotency_key=once)  # of another scope
    again = await asyncio.gather(
        *(support_sets.create("s", [example("a", RED)], idempotency_key=once) for _ in range(4))
    )
    assert again == [first] * 4
    assert await support_sets.put_examples("s", [example("b")], idempotency_key=once) == added
    assert (await support_sets.get("s")).version == 2
    with pytest.raises(IdempotencyConflict):
        await support_sets.create("t", [], idempotency_key=IdempotencyKey("key-1", "another digest"))
    clock.now += RETENTION_SECONDS + 1
    assert (await support_sets.create("t", [], idempotency_key=IdempotencyKey("key-1", "another digest"))).name == "t"


async def test_a_first_answer_is_repeated_when_its_set_is_gone(support_sets: SupportSets) -> None:
    once = IdempotencyKey("key-1", "digest")
    first = await support_sets.create("s", [example("a", label="warm")], idempotency_key=once)
    await support_sets.delete("s")
    assert await support_sets.create("s", [example("a", label="warm")], idempotency_key=once) == first


async def test_a_first_answer_takes_no_room_for_the_many_labels_of_its_set(
    support_sets: SupportSets, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support_sets_module, "MAX_STORED_LABELS", 7)
    await support_sets.create("s", [example("a", label="warm"), example("b", label="cold")])
    once = IdempotencyKey("key-1", "digest")
    added = [example("c", label="warm")]
    first = await support_sets.put_examples("s", added, idempotency_key=once)
    assert first.label_counts == {"warm": 2, "cold": 1}
    stored = await database.read(lambda session, now: session.scalars(select(IdempotencyRow.answer)).one())
    assert stored["label_counts"] == {}
    await support_sets.remove_examples("s", ["a"])
    assert await support_sets.put_examples("s", added, idempotency_key=once) == first
    await support_sets.delete("s")
    with pytest.raises(SupportSetNotFound):
        await support_sets.put_examples("s", added, idempotency_key=once)


async def test_a_sweep_deletes_few_old_answers_at_once(
    support_sets: SupportSets, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other writers wait for each transaction."""
    monkeypatch.setattr(retention, "ROWS_PER_TRANSACTION", 2)
    delete_some = partial(retention.delete_some_old, IdempotencyRow, RETENTION_SECONDS)
    for number in range(5):
        await support_sets.create(f"s{number}", [], idempotency_key=IdempotencyKey(f"key {number}", "digest"))
    clock.now += RETENTION_SECONDS + 1
    await support_sets.create("new", [], idempotency_key=IdempotencyKey("new", "digest"))
    assert await database.write(delete_some) == 2
    await support_sets.sweep()
    assert await database.write(delete_some) == 0
    with pytest.raises(IdempotencyConflict):
        await support_sets.create("other", [], idempotency_key=IdempotencyKey("new", "another digest"))


async def test_concurrent_repetitions_of_a_request_take_effect_once(
    support_sets: SupportSets, store: MediaStore
) -> None:
    once = IdempotencyKey("key", "digest")
    infos = await asyncio.gather(
        *(support_sets.create(None, [example("a", RED)], idempotency_key=once) for _ in range(6))
    )
    assert len({info.id for info in infos}) == 1
    assert len(await support_sets.page("", 10)) == 1
    await support_sets.delete(infos[0].id)
    await support_sets.sweep()
    assert not store.exists(RED.id)  # no repetition holds a lease
