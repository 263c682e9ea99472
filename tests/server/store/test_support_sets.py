"""Support sets as those see them who use them: versions that never change, media that stay while they are shown."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from server.errors import (
    ExampleNotFound,
    IdempotencyConflict,
    MediaInUse,
    MediaNotFound,
    NameTaken,
    SupportSetNotFound,
    TooManyExamples,
    VersionConflict,
)
from server.media.source import EncodedMedia, encoded
from server.media.store import MediaStore
from server.store import idempotency as idempotency
from server.store import media_import as media_porter
from server.store import support_sets as module
from server.store.media_import import MediaImport
from server.store.records import NewExample
from server.store.support_sets import IdempotencyKey, SupportSets

pytestmark = pytest.mark.anyio

RED, GREEN, BLUE = (encoded(name, "image", "") for name in (b"red", b"green", b"blue"))


def example(name: str, *media: EncodedMedia, **fields: Any) -> NewExample:
    return NewExample(id=name, media=media, **{"text": f"text of {name}", **fields})


class Clock:
    """The time that the modules under test read."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(media_porter, "time", clock)
    return clock


async def ids(support_sets: SupportSets, name: str, version: int | None = None) -> list[str]:
    return [e.id for e in (await support_sets.get_version(name, version)).examples]


async def test_a_set_is_read_as_it_was_made(support_sets: SupportSets, clock: Clock) -> None:
    given = example("a", RED, GREEN, RED, label="warm", question="which?", metadata={"fold": 3, "tags": ["x"]})
    info = await support_sets.create("colours", [given, example("b")], metadata={"owner": "tests"}, expires_at=2e6)
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


async def test_every_change_makes_a_version_and_old_ones_stay(support_sets: SupportSets) -> None:
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


async def test_a_change_of_another_version_is_refused(support_sets: SupportSets) -> None:
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


async def test_writers_side_by_side_each_get_a_version_of_their_own(support_sets: SupportSets) -> None:
    await support_sets.create("s", [])
    put = [support_sets.put_examples("s", [example(f"e{number}", RED)]) for number in range(12)]
    infos = await asyncio.gather(*put)
    assert sorted(info.version for info in infos) == list(range(2, 14))
    for info in infos:
        assert info.num_examples == info.version - 1 == len(await ids(support_sets, "s", info.version))


async def test_of_those_who_expect_one_version_only_one_succeeds(support_sets: SupportSets) -> None:
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


async def test_an_update_changes_what_it_names_and_no_version(support_sets: SupportSets, clock: Clock) -> None:
    info = await support_sets.create("s", [example("a")], metadata={"a": 1})
    clock.now += 5
    changed = await support_sets.update("s", {"is_pinned": True, "metadata": {"b": 2}, "expires_at": clock.now + 9})
    assert (changed.is_pinned, changed.metadata, changed.expires_at) == (True, {"b": 2}, clock.now + 9)
    assert (changed.name, changed.version, changed.created_at) == ("s", 1, info.created_at)
    assert changed.updated_at == clock.now
    assert await support_sets.pinned() == [(info.id, 1)]


async def test_a_set_holds_so_many_examples_and_no_more(support_sets: SupportSets) -> None:
    with pytest.raises(TooManyExamples, match="21 examples, the limit is 20"):
        await support_sets.create("s", [example(f"e{i}") for i in range(21)])
    await support_sets.create("s", [example(f"e{i}") for i in range(20)])
    assert (await support_sets.put_examples("s", [example("e0", text="new")])).num_examples == 20
    with pytest.raises(TooManyExamples):
        await support_sets.put_examples("s", [example("e0"), example("new")])
    assert (await support_sets.get("s")).version == 2


async def test_an_expired_set_is_gone_at_once_and_its_name_free(
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


async def test_media_stay_while_any_version_of_any_set_shows_them(
    support_sets: SupportSets, store: MediaStore, clock: Clock
) -> None:
    await support_sets.create("s", [example("a", RED), example("b", GREEN)])
    await support_sets.create("t", [example("a", GREEN)])
    await support_sets.remove_examples("s", ["a", "b"])
    await support_sets.sweep()
    assert await support_sets.is_used(RED.id)  # by version 1
    with pytest.raises(MediaInUse):
        await support_sets.delete_media(RED.id)
    await support_sets.delete("s")
    assert not await support_sets.is_used(RED.id)
    assert await support_sets.is_used(GREEN.id)
    await support_sets.sweep()
    assert (store.exists(RED.id), store.exists(GREEN.id)) == (False, True)


async def test_what_a_client_uploaded_by_itself_stays_until_it_deletes_it(
    support_sets: SupportSets, store: MediaStore
) -> None:
    store.put(RED.data, "image")
    await support_sets.create("s", [example("a", store.find(RED.id), GREEN, BLUE)])
    await support_sets.mark_uploaded(BLUE.id, len(BLUE.data))
    await support_sets.delete("s")
    await support_sets.sweep()
    assert [store.exists(m.id) for m in (RED, GREEN, BLUE)] == [True, False, True]
    await support_sets.delete_media(RED.id)
    assert not store.exists(RED.id)
    with pytest.raises(MediaNotFound):
        await support_sets.delete_media(RED.id)


@pytest.mark.parametrize("step", ["_sizes", "_put"])
async def test_what_a_client_uploads_while_a_set_is_made_stays(
    support_sets: SupportSets, store: MediaStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """`step`: of storing, behind which the upload comes: before the set's row of the media is written, or after."""
    done = getattr(MediaImport, step)

    def upload_behind(self: MediaImport, *given: Any) -> Any:
        result = done(self, *given)
        store.put(RED.data, "image")
        asyncio.run(support_sets.mark_uploaded(RED.id, len(RED.data)))
        return result

    with monkeypatch.context() as patched:
        patched.setattr(MediaImport, step, upload_behind)
        await support_sets.create("s", [example("a", RED)])
    await support_sets.create("t", [example("a", RED, GREEN)])
    await support_sets.delete("s")
    await support_sets.delete("t")
    await support_sets.sweep()
    assert [store.exists(m.id) for m in (RED, GREEN)] == [True, False]


async def test_uploads_and_sets_that_show_them_at_once(support_sets: SupportSets, store: MediaStore) -> None:
    many = [encoded(b"%d" % number, "image", "") for number in range(8)]

    async def upload(media: EncodedMedia) -> None:
        store.put(media.data, "image")
        await support_sets.mark_uploaded(media.id, len(media.data))

    made = (support_sets.create(media.id, [example("a", media)]) for media in many)
    await asyncio.gather(*made, *map(upload, many))
    for media in many:
        await support_sets.delete(media.id)
    await support_sets.sweep()
    assert all(store.exists(media.id) for media in many)


async def test_bytes_are_counted_once_of_what_sets_show(support_sets: SupportSets) -> None:
    await support_sets.mark_uploaded(BLUE.id, len(BLUE.data))
    assert (await support_sets.totals()).num_bytes == 0
    await support_sets.create("s", [example("a", RED, BLUE), example("b", RED)])
    assert (await support_sets.totals()).num_bytes == len(RED.data + BLUE.data)


async def test_media_of_a_request_under_way_are_not_swept(
    support_sets: SupportSets, store: MediaStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = MediaStore.put
    seen = []

    def put_slowly(self: MediaStore, *given: Any, **named: Any) -> str:
        name = put(self, *given, **named)
        asyncio.run(support_sets.sweep())
        seen.append(store.exists(name))
        return name

    monkeypatch.setattr(MediaStore, "put", put_slowly)
    await support_sets.create("s", [example("a", RED, GREEN)])
    assert seen == [True, True]


async def test_media_stored_too_slowly_are_stored_again(
    support_sets: SupportSets, store: MediaStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = MediaStore.put
    delays = [1e6]

    def put_and_sweep(self: MediaStore, *given: Any, **named: Any) -> str:
        name = put(self, *given, **named)
        if delays:
            clock.now += delays.pop()
            asyncio.run(support_sets.sweep())
            assert not store.exists(name)
        return name

    monkeypatch.setattr(MediaStore, "put", put_and_sweep)
    await support_sets.create("s", [example("a", RED)])
    assert not delays
    assert store.get(RED.id).data == b"red"


async def test_a_stored_media_that_is_gone_is_refused(support_sets: SupportSets, store: MediaStore) -> None:
    store.put(RED.data, "image")
    found = store.find(RED.id, "examples[0].media[0].image_id")
    store.delete(RED.id)
    with pytest.raises(MediaNotFound):
        await support_sets.create("s", [example("a", found)])
    with pytest.raises(SupportSetNotFound):
        await support_sets.get("s")


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
    clock.now += idempotency.KEPT_SECONDS + 1
    assert (await support_sets.create("t", [], idempotency_key=IdempotencyKey("key-1", "another digest"))).name == "t"


async def test_the_same_request_twice_at_once_is_done_once(support_sets: SupportSets) -> None:
    once = IdempotencyKey("key", "digest")
    infos = await asyncio.gather(
        *(support_sets.create(None, [example("a", RED)], idempotency_key=once) for _ in range(6))
    )
    assert len({info.id for info in infos}) == 1
    assert len(await support_sets.page("", 10)) == 1


async def test_sets_come_in_pages_the_oldest_first(support_sets: SupportSets, clock: Clock) -> None:
    made = []
    for number in range(5):
        clock.now += 1
        made.append((await support_sets.create(f"s{number}", [])).id)
    first = await support_sets.page("", 2)
    await support_sets.delete(first[1].id)  # a page goes on behind a set that has gone
    rest = await support_sets.page(first[1].id, 10)
    assert [info.id for info in [*first, *rest]] == made


async def test_embeddings_are_kept_by_model_and_go_with_their_media(support_sets: SupportSets, clock: Clock) -> None:
    vectors = {RED.id: np.array([0.5, -1.25, 3e-8], np.float32), "text": np.ones(3, np.float32)}
    await support_sets.create("s", [example("a", RED)])
    await support_sets.put_embeddings(vectors, "model-a")
    await support_sets.put_embeddings({**vectors, "new": np.zeros(3, np.float32)}, "model-a")
    found = await support_sets.embeddings([RED.id, "text", "other"], "model-a")
    assert found.keys() == vectors.keys()
    for key, vector in vectors.items():
        assert found[key].dtype == np.float32
        assert found[key].tobytes() == vector.tobytes()
    assert await support_sets.embeddings([RED.id], "model-b") == {}
    await support_sets.delete("s")
    await support_sets.sweep()
    assert (await support_sets.embeddings([RED.id, "text"], "model-a")).keys() == {"text"}
    clock.now += 100 * 24 * 3600
    await support_sets.sweep()
    assert await support_sets.embeddings(["text"], "model-a") == {}


async def test_more_ids_than_one_statement_takes(database: Any, store: MediaStore) -> None:
    support_sets = SupportSets(database, store)
    many = [example(f"e{i:04}") for i in range(2500)]
    await support_sets.create("s", many)
    await support_sets.put_examples("s", [*many[:1500], example("new")])
    info = await support_sets.remove_examples("s", [e.id for e in many[:2400]])
    assert info.num_examples == 101
    assert await ids(support_sets, "s") == [*(e.id for e in many[2400:]), "new"]
    keys = [f"key {i}" for i in range(2500)]
    await support_sets.put_embeddings({key: np.zeros(1, np.float32) for key in keys}, "m")
    assert len(await support_sets.embeddings(keys, "m")) == 2500
