"""Support sets through their public methods: versions never change, and concurrent changes exclude each other."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.orm import Session

from server.errors import (
    ExampleNotFound,
    IdempotencyConflict,
    NameTaken,
    SupportSetNotFound,
    TooManyExamples,
    VersionConflict,
)
from server.media.store import MediaStore
from server.store import support_sets as support_sets_module
from server.store import versions
from server.store.database import Database
from server.store.media_references import MediaReferences
from server.store.records import Example
from server.store.support_sets import RETENTION_SECONDS, IdempotencyKey, SupportSets
from tests.server.store.conftest import BLUE, GREEN, RED, Clock, example

pytestmark = pytest.mark.anyio


async def ids(support_sets: SupportSets, name: str, version: int | None = None) -> list[str]:
    return [e.id for e in (await support_sets.get_version(name, version)).examples]


async def test_a_set_is_read_as_it_was_created(support_sets: SupportSets, clock: Clock) -> None:
    labelled = example("a", RED, GREEN, RED, label="warm", question="which?", metadata={"fold": 3, "tags": ["x"]})
    info = await support_sets.create("colours", [labelled, example("b")], metadata={"owner": "tests"}, expires_at=2e6)
    assert info == await support_sets.get("colours") == await support_sets.get(info.id)
    assert (info.name, info.version, info.num_examples, info.num_media, info.num_bytes) == ("colours", 1, 2, 2, 8)
    assert (info.created_at, info.expires_at, info.is_pinned, info.metadata) == (1e6, 2e6, False, {"owner": "tests"})
    support_set = await support_sets.get_version(info.id)
    first, second = support_set.examples
    assert (first.id, first.media, first.text) == ("a", (RED.id, GREEN.id, RED.id), "text of a")
    assert (first.label, first.question, first.metadata) == ("warm", "which?", {"fold": 3, "tags": ["x"]})
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
    monkeypatch.setattr(support_sets_module, "MAX_CACHED_EXAMPLES", 3)
    await support_sets.create("s", [example("a")])
    for _ in range(3):
        await support_sets.put_examples("s", [example("a")])
    await support_sets.put_examples("s", [example(name) for name in "bcd"])
    for version in (1, 2, 3, 1, 4, 1, 3):  # of these four versions three fit
        await support_sets.get_version("s", version)
    assert read == [1, 2, 3, 4]
    for version in (5, 5):  # a version that does not fit by itself
        await support_sets.get_version("s", version)
    assert read == [1, 2, 3, 4, 5]


async def test_an_unknown_set_version_or_example_is_named(support_sets: SupportSets) -> None:
    await support_sets.create("s", [example("a")])
    for version in (0, 2):
        with pytest.raises(SupportSetNotFound, match=f"versions 1 to 1, not {version}"):
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
    assert await support_sets.pinned() == [(info.id, 1)]


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
    assert await support_sets.pinned() == []
    assert store.exists(RED.id)
    await support_sets.sweep()
    assert not store.exists(RED.id)
    assert (await support_sets.create("s", [], expires_at=clock.now + 1)).id != info.id
    clock.now += 2
    await support_sets.create("s", [example("a", RED)])  # not swept in between


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


async def test_pages_list_the_oldest_sets_first(support_sets: SupportSets, clock: Clock) -> None:
    created = []
    for number in range(5):
        clock.now += 1
        created.append((await support_sets.create(f"s{number}", [])).id)
    first = await support_sets.page("", 2)
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
