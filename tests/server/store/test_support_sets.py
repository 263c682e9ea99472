"""Support sets through their public methods: versions never change, and concurrent changes exclude each other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from server.errors import (
    ExampleNotFound,
    NameTaken,
    SupportSetNotFound,
    TooManyExamples,
    TooManySupportSets,
    VersionConflict,
)
from server.media.store import MediaStore
from server.store import staging, versions
from server.store.database import Database, Result, Transaction
from server.store.media_references import MediaReferences
from server.store.records import Example, ExampleRow, NewExample, SupportSetRow
from server.store.support_sets import IdempotencyKey, SupportSets
from tests.server.store.conftest import BLUE, GREEN, RED, Clock, example

pytestmark = pytest.mark.anyio


async def ids(support_sets: SupportSets, name: str, version: int | None = None) -> list[str]:
    return [e.id for e in (await support_sets.get_version(name, version)).examples]


async def test_metadata_take_no_more_bytes_than_in_a_request(support_sets: SupportSets) -> None:
    await support_sets.create("s", [example("a", metadata={"имя": "é", "n": 2**70})])
    (stored,) = (await support_sets.get_version("s")).examples
    assert stored.metadata_json == f'{{"имя":"é","n":{2**70}}}'


async def test_a_set_is_read_as_it_was_created(support_sets: SupportSets, clock: Clock) -> None:
    labelled = example("a", RED, GREEN, RED, RED, label="warm", question="which?", metadata={"fold": 3, "tags": ["x"]})
    info = await support_sets.create("colours", [labelled, example("b")], metadata={"owner": "tests"}, expires_at=2e6)
    assert info == await support_sets.get("colours") == await support_sets.get(info.id)
    assert (info.name, info.version, info.num_examples, info.num_media, info.num_bytes) == ("colours", 1, 2, 2, 8)
    assert (info.created_at, info.expires_at, info.is_pinned, info.metadata) == (1e6, 2e6, False, {"owner": "tests"})
    support_set = await support_sets.get_version(info.id)
    first, second = support_set.examples
    assert (first.id, first.media, first.text) == ("a", (RED.id, GREEN.id, RED.id, RED.id), "text of a")
    assert (first.label, first.question, json.loads(first.metadata_json)) == (
        "warm",
        "which?",
        {"fold": 3, "tags": ["x"]},
    )
    assert (second.id, second.media) == ("b", ())
    assert support_set.media == [RED.id, GREEN.id]
    assert info.label_counts == {"warm": 1}


async def test_every_change_creates_a_version_and_earlier_ones_stay(support_sets: SupportSets) -> None:
    await support_sets.create("s", [example("a", RED), example("b", GREEN), example("c")])
    await support_sets.put_examples("s", [example("b", BLUE, text="new"), example("d")])
    await support_sets.remove_examples("s", ["a", "c"])
    info = await support_sets.put_examples("s", [example("a", text="again")])
    assert info.version == info.latest_version == 4
    assert [await ids(support_sets, "s", version) for version in (1, 2, 3, 4)] == [
        ["a", "b", "c"],
        ["a", "b", "c", "d"],
        ["b", "d"],
        ["b", "d", "a"],
    ]
    texts = [(await support_sets.get_version("s", version)).examples[1].text for version in (1, 2)]
    assert texts == ["text of b", "new"]
    assert (await support_sets.get_version("s", 1)).media == [RED.id, GREEN.id]
    assert (await support_sets.get_version("s", 2)).media == [RED.id, BLUE.id]
    assert (await support_sets.get("s", 1)).num_bytes == len(b"red" + b"green")
    history = await support_sets.versions("s", 0, 100)
    assert [(v.version, v.num_examples, v.num_added, v.num_replaced, v.num_removed) for v in history] == [
        (1, 3, 3, 0, 0),
        (2, 4, 1, 1, 0),
        (3, 2, 0, 0, 2),
        (4, 3, 1, 0, 0),
    ]
    assert [v.version for v in await support_sets.versions("s", 1, 2)] == [2, 3]


async def test_the_versions_that_were_read_last_are_in_memory(
    support_sets: SupportSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    examples = versions.examples

    def counted(session: Session, set_id: str, version: int) -> tuple[Example, ...]:
        read.append(version)
        return examples(session, set_id, version)

    monkeypatch.setattr(versions, "examples", counted)
    monkeypatch.setattr(support_sets._versions._versions, "max_size", 1700)
    await support_sets.create("s", [example("a")])
    for _ in range(3):
        await support_sets.put_examples("s", [example("a")])
    await support_sets.put_examples("s", [example("a", question="a" * 3000)])
    for version in (1, 2, 3, 1, 4, 1, 3):  # of these four versions three fit
        await support_sets.get_version("s", version)
    assert read == [1, 2, 3, 4]
    for version in (5, 5):  # a version that does not fit by itself
        await support_sets.get_version("s", version)
    assert read == [1, 2, 3, 4, 5]


async def test_an_unknown_set_version_or_example_is_named(support_sets: SupportSets) -> None:
    await support_sets.create("s", [example("a")])
    for version in (0, 2):
        with pytest.raises(SupportSetNotFound, match=f"^the support set has versions 1 to 1, not {version}$"):
            await support_sets.get_version("s", version)
    with pytest.raises(SupportSetNotFound, match="no support set 'other'"):
        await support_sets.put_examples("other", [example("a")])
    with pytest.raises(ExampleNotFound, match="no example 'b', 'c'"):
        await support_sets.remove_examples("s", ["a", "b", "c"])
    assert await ids(support_sets, "s") == ["a"]


async def test_a_change_that_expects_another_version_is_refused(support_sets: SupportSets) -> None:
    await support_sets.create("s", [example("a")])
    await support_sets.put_examples("s", [example("b")], expected_version=1)
    with pytest.raises(VersionConflict, match="at version 2, not 1"):
        await support_sets.put_examples("s", [example("c", RED)], expected_version=1)
    with pytest.raises(VersionConflict):
        await support_sets.remove_examples("s", ["a"], expected_version=1)
    with pytest.raises(VersionConflict):
        await support_sets.update("s", {"name": "t"}, expected_version=1)
    with pytest.raises(VersionConflict):
        await support_sets.delete("s", expected_version=1)
    assert await ids(support_sets, "s") == ["a", "b"]


async def test_concurrent_writers_each_create_a_version(support_sets: SupportSets) -> None:
    await support_sets.create("s", [])
    put = [support_sets.put_examples("s", [example(f"e{number}", RED)]) for number in range(12)]
    infos = await asyncio.gather(*put)
    assert sorted(info.version for info in infos) == list(range(2, 14))
    for info in infos:
        assert info.num_examples == info.version - 1 == len(await ids(support_sets, "s", info.version))


async def test_only_one_of_several_writers_that_expect_a_version_succeeds(support_sets: SupportSets) -> None:
    await support_sets.create("s", [])
    put = [support_sets.put_examples("s", [example(f"e{i}")], expected_version=1) for i in range(8)]
    results = await asyncio.gather(*put, return_exceptions=True)
    assert sum(isinstance(result, VersionConflict) for result in results) == 7
    assert len(await ids(support_sets, "s", 2)) == 1


async def test_a_name_is_taken_once(support_sets: SupportSets) -> None:
    created = await asyncio.gather(*(support_sets.create("s", []) for _ in range(6)), return_exceptions=True)
    assert sum(isinstance(result, NameTaken) for result in created) == 5
    other = await support_sets.create(None, [])
    with pytest.raises(NameTaken, match="'s'"):
        await support_sets.update(other.id, {"name": "s"})
    assert (await support_sets.update("s", {"name": "s"})).name == "s"
    assert (await support_sets.update("s", {"name": None})).name is None
    assert (await support_sets.update(other.id, {"name": "s"})).id == (await support_sets.get("s")).id == other.id


async def test_an_update_changes_only_its_fields_and_no_version(support_sets: SupportSets, clock: Clock) -> None:
    info = await support_sets.create("s", [example("a")], metadata={"a": 1})
    clock.now += 5
    changed = await support_sets.update("s", {"is_pinned": True, "metadata": {"b": 2}, "expires_at": clock.now + 9})
    assert (changed.is_pinned, changed.metadata, changed.expires_at) == (True, {"b": 2}, clock.now + 9)
    assert (changed.name, changed.version, changed.created_at) == ("s", 1, info.created_at)
    assert changed.updated_at == clock.now
    assert await support_sets.pinned() == {"": [(info.id, 1)]}


async def test_the_number_of_examples_is_limited(support_sets: SupportSets) -> None:
    with pytest.raises(TooManyExamples, match="21 examples, the limit is 20"):
        await support_sets.create("s", [example(f"e{i}") for i in range(21)])
    await support_sets.create("s", [example(f"e{i}") for i in range(20)])
    assert (await support_sets.put_examples("s", [example("e0", text="new")])).num_examples == 20
    with pytest.raises(TooManyExamples):
        await support_sets.put_examples("s", [example("e0"), example("new")])
    assert (await support_sets.get("s")).version == 2


async def test_an_expired_set_is_not_found_and_its_name_is_free(
    support_sets: SupportSets, store: MediaStore, clock: Clock
) -> None:
    info = await support_sets.create("s", [example("a", RED)], expires_at=clock.now + 10, is_pinned=True)
    clock.now += 9.9
    assert await ids(support_sets, "s") == ["a"]
    clock.now += 0.1
    for name in ("s", info.id):
        with pytest.raises(SupportSetNotFound):
            await support_sets.get_version(name)
    with pytest.raises(SupportSetNotFound):
        await support_sets.update("s", {"expires_at": None})
    assert await support_sets.page("", 10) == []
    assert await support_sets.pinned() == {}
    assert store.exists(RED.id)
    await support_sets.sweep()
    assert not store.exists(RED.id)
    assert (await support_sets.create("s", [], expires_at=clock.now + 1)).id != info.id
    clock.now += 2
    await support_sets.create("s", [example("a", RED)])  # not swept in between


async def test_a_sweep_deletes_few_sets_at_once(
    support_sets: SupportSets, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other writers wait for each transaction."""
    monkeypatch.setattr(versions, "SETS_PER_TRANSACTION", 2)
    for number in range(5):
        await support_sets.create(f"s{number}", [], expires_at=clock.now + 10)
    clock.now += 10
    assert await database.write(versions.delete_expired) == 2
    await support_sets.sweep()
    assert await database.write(versions.delete_expired) == 0


async def test_concurrent_writers_create_no_more_sets_than_permitted(support_sets: SupportSets) -> None:
    creations = [support_sets.create(None, [], max_sets=2) for _ in range(8)]
    created = await asyncio.gather(*creations, return_exceptions=True)
    assert len(await support_sets.page("", 10)) == 2
    assert sum(isinstance(result, TooManySupportSets) for result in created) == 6


async def test_pages_list_the_oldest_sets_first(support_sets: SupportSets, clock: Clock) -> None:
    created = []
    for number in range(5):
        clock.now += 1
        created.append((await support_sets.create(f"s{number}", [])).id)
    first = await support_sets.page("", 2)
    assert [info.id for info in await support_sets.page(first[0].id, 10)] == created[1:]
    await support_sets.delete(first[1].id)  # a page may follow a deleted set
    rest = await support_sets.page(first[1].id, 10)
    assert [info.id for info in [*first, *rest]] == created


async def test_more_ids_than_fit_into_one_statement(database: Database, media_references: MediaReferences) -> None:
    support_sets = SupportSets(database, media_references)
    many = [example(f"e{i:04}") for i in range(2500)]
    await support_sets.create("s", many)
    await support_sets.put_examples("s", [*many[:1500], example("new")])
    info = await support_sets.remove_examples("s", [e.id for e in many[:2400]])
    assert info.num_examples == 101
    assert await ids(support_sets, "s") == [*(e.id for e in many[2400:]), "new"]


def num_rows(session: Session, now: float) -> int:
    return session.scalar(select(func.count()).select_from(ExampleRow)) or 0


def num_unpublished(session: Session, now: float) -> int:
    return session.scalar(select(func.count()).where(SupportSetRow.version == 0)) or 0


def run_after_each_write(
    database: Database, monkeypatch: pytest.MonkeyPatch, then: Callable[[], Awaitable[None]]
) -> None:
    """Run another client's work after each transaction that writes."""
    write = database.write

    async def watched(transaction: Transaction[Result]) -> Result:
        result = await write(transaction)
        with monkeypatch.context() as plain:
            plain.setattr(database, "write", write)
            await then()
        return result

    monkeypatch.setattr(database, "write", watched)


async def test_other_writers_and_readers_come_between_the_parts_of_a_large_request(
    database: Database, media_references: MediaReferences, monkeypatch: pytest.MonkeyPatch
) -> None:
    support_sets = SupportSets(database, media_references)
    await support_sets.create("other", [])
    seen: list[tuple[int, list[str | None]]] = []

    async def look() -> None:
        await support_sets.update("other", {"metadata": {"n": len(seen)}})
        names = [info.name for info in await support_sets.page("", 10)]
        seen.append((await database.read(num_rows), names))

    run_after_each_write(database, monkeypatch, look)
    await support_sets.create("large", [example(f"e{number}", RED) for number in range(700)])
    rows = [0, *(number for number, _ in seen)]
    assert rows[-1] == 700
    assert max(after - before for before, after in pairwise(rows)) <= 250
    assert [names for _, names in seen] == [["other", "large"] if number == 700 else ["other"] for number, _ in seen]


async def test_a_change_in_parts_equals_one_in_a_single_transaction(
    support_sets: SupportSets, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def change() -> list[list[tuple[str, str, tuple[str, ...]]]]:
        info = await support_sets.create(None, [example(f"e{i}", RED) for i in range(7)])
        await support_sets.put_examples(info.id, [example(f"e{i}", GREEN, text="new") for i in (5, 9, 1, 8, 2)])
        await support_sets.remove_examples(info.id, ["e1", "e6"])
        changed = await support_sets.put_examples(info.id, [example(f"e{i}", BLUE) for i in (1, 0, 3)])
        assert (changed.version, changed.num_examples, changed.example_ids) == (4, 8, ("e1", "e0", "e3"))
        sets = [await support_sets.get_version(info.id, version) for version in (1, 2, 3, 4)]
        return [[(e.id, e.text, e.media) for e in support_set.examples] for support_set in sets]

    expected = await change()
    monkeypatch.setattr(staging, "EXAMPLES_PER_TRANSACTION", 2)
    assert await change() == expected
    assert [e[0] for e in expected[3]] == ["e0", "e2", "e3", "e4", "e5", "e9", "e8", "e1"]
    assert await database.read(num_unpublished) == 0


async def test_a_large_request_that_fails_leaves_nothing(
    support_sets: SupportSets, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "EXAMPLES_PER_TRANSACTION", 2)
    many = [example(f"e{i}", RED) for i in range(9)]
    once = IdempotencyKey("key", "digest")
    await support_sets.create("s", many, idempotency_key=once)
    before = await database.read(num_rows)
    with pytest.raises(VersionConflict):
        await support_sets.put_examples("s", many, expected_version=7)
    with pytest.raises(TooManyExamples):
        await support_sets.put_examples("s", [example(f"new{i}") for i in range(13)])
    creating = asyncio.create_task(support_sets.create("t", many))

    async def cancel() -> None:
        creating.cancel()

    run_after_each_write(database, monkeypatch, cancel)
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert (await database.read(num_rows), await database.read(num_unpublished)) == (before, 0)
    assert [info.name for info in await support_sets.page("", 10)] == ["s"]


@pytest.mark.parametrize("is_swept", [True, False])
async def test_parts_that_expired_are_stored_again(
    support_sets: SupportSets, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch, is_swept: bool
) -> None:
    monkeypatch.setattr(staging, "EXAMPLES_PER_TRANSACTION", 2)
    store, delays = staging.Staging.store, [1e6, 0.0]

    async def store_slowly(self: staging.Staging) -> None:
        await store(self)
        clock.now += delays.pop(0)
        if is_swept:
            await support_sets.sweep()

    monkeypatch.setattr(staging.Staging, "store", store_slowly)
    many: list[NewExample] = [example(f"e{i}") for i in range(5)]
    await support_sets.create("s", many)
    assert not delays
    assert await ids(support_sets, "s") == [e.id for e in many]
    assert await database.read(num_rows) == 5
