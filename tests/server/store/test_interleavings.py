"""Two requests that change support sets at the same time, in the order in which they could go wrong."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

import pytest
from sqlalchemy.orm import Session

from server.errors import SupportSetNotFound
from server.media.source import EncodedMedia
from server.media.store import MediaStore
from server.store import versions
from server.store.database import Database, Result, Transaction
from server.store.media_references import MediaReferences
from server.store.records import SupportSetInfo
from server.store.support_sets import IdempotencyKey, SupportSets
from tests.server.store.conftest import RED, Clock, example

pytestmark = pytest.mark.anyio
ONCE = IdempotencyKey("key", "digest")


class Interrupted(Database):
    """A database in which something else happens after the first read."""

    def __init__(self, database: Database) -> None:
        self.__dict__.update(database.__dict__)
        self.results: list[Any] = []

    async def interrupt(self) -> Any:
        raise NotImplementedError

    async def read(self, transaction: Transaction[Result]) -> Result:
        result = await super().read(transaction)
        if not self.results:
            self.results.append(None)
            self.results.append(await self.interrupt())
        return result


def interrupted(support_sets: SupportSets, database: Interrupted) -> SupportSets:
    other = copy(support_sets)
    other._database = database
    return other


async def test_a_repetition_gets_the_answer_of_a_request_that_takes_its_name_meanwhile(
    support_sets: SupportSets, database: Database
) -> None:
    class WithFirst(Interrupted):
        async def interrupt(self) -> SupportSetInfo:
            return await support_sets.create("birds", [example("a")], idempotency_key=ONCE)

    busy = WithFirst(database)
    again = await interrupted(support_sets, busy).create("birds", [example("a")], idempotency_key=ONCE)
    assert again == busy.results[1]


async def test_concurrent_repetitions_with_a_name_get_one_answer(support_sets: SupportSets) -> None:
    for number in range(5):
        once = IdempotencyKey(f"key {number}", "digest")
        creations = [support_sets.create(f"s{number}", [example("a")], idempotency_key=once) for _ in range(6)]
        assert len({info.id for info in await asyncio.gather(*creations)}) == 1


async def test_a_sweep_spares_a_set_that_is_extended_meanwhile(
    support_sets: SupportSets, database: Database, clock: Clock
) -> None:
    has_extended = threading.Event()

    def extend(session: Session, now: float) -> None:
        row = versions.find(session, "", "s", now, lock=True)
        versions.update_set(session, row, now, {"expires_at": now + 100})
        has_extended.set()
        time.sleep(0.3)  # the sweep finds the set as it was

    await support_sets.create("s", [], expires_at=clock.now + 10)
    extending = asyncio.create_task(database.write(extend))
    await asyncio.to_thread(has_extended.wait)
    clock.now += 20
    await support_sets.sweep()
    await extending
    assert (await support_sets.get("s")).expires_at == clock.now + 80


async def test_a_change_is_of_the_set_that_had_the_name_when_it_arrived(
    support_sets: SupportSets, database: Database
) -> None:
    class WithAnother(Interrupted):
        async def interrupt(self) -> None:
            await support_sets.delete("birds")
            await support_sets.create("birds", [example("z")])

    await support_sets.create("birds", [example("a")])
    with pytest.raises(SupportSetNotFound):
        await interrupted(support_sets, WithAnother(database)).put_examples("birds", [example("b")])
    assert (await support_sets.get("birds")).version == 1


async def test_a_set_that_was_decoded_for_long_is_on_a_later_page(
    support_sets: SupportSets, media_references: MediaReferences, clock: Clock
) -> None:
    class Slow(MediaReferences):
        async def _decode(self, media: Mapping[str, EncodedMedia]) -> dict[str, dict[str, Any]]:
            await is_listed.wait()
            return await super()._decode(media)

    is_listed, slow = asyncio.Event(), copy(support_sets)
    slow._media = Slow(media_references._database, media_references._store)
    late = asyncio.create_task(slow.create("late", [example("a")]))
    await asyncio.sleep(0.05)
    clock.now += 1
    await support_sets.create("early", [example("a")])
    (first,) = await support_sets.page("", 10)
    is_listed.set()
    clock.now += 1
    await late
    assert [info.name for info in await support_sets.page(first.id, 10)] == ["late"]
    assert [info.name for info in await support_sets.page("", 10)] == ["early", "late"]
    await support_sets.delete(first.id)
    assert [info.name for info in await support_sets.page(first.id, 10)] == ["late"]
    assert await support_sets.page("no id", 10) == []


async def test_media_that_are_swept_while_they_are_sent_again_are_not_uploads(
    support_sets: SupportSets, media_references: MediaReferences, store: MediaStore
) -> None:
    class Swept(MediaReferences):
        def _stored(self, media_ids: Iterable[str]) -> set[str]:
            stored = super()._stored(media_ids)
            asyncio.run_coroutine_threadsafe(support_sets.sweep(), loop).result()
            return stored

    loop, other = asyncio.get_running_loop(), copy(support_sets)
    other._media = Swept(media_references._database, store)
    await support_sets.create("first", [example("a", RED)])
    await support_sets.delete("first")
    await other.create("second", [example("a", RED)])
    assert store.exists(RED.id)
    await support_sets.delete("second")
    await support_sets.sweep()
    assert not store.exists(RED.id)
