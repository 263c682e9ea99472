"""Media of support sets: they stay while any version refers to them; uploaded ones stay until their client deletes them."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from server.errors import DatabaseUnavailable, InvalidMedia, MediaInUse, MediaNotFound, SupportSetNotFound
from server.media.decoder import Frames
from server.media.source import EncodedMedia, encoded
from server.media.store import MediaStore
from server.media.turns import Job
from server.store import media_references as module
from server.store.database import SWEEP_PAUSE_SECONDS, Database, Transaction
from server.store.media_references import LEASE_SECONDS, MAX_FAILURES, MediaReferences, _is_referred_to
from server.store.records import MediaRow
from server.store.support_sets import SupportSets
from tests.server.store.conftest import BLUE, GREEN, RED, Clock, example

pytestmark = pytest.mark.anyio


async def test_media_stay_while_any_version_of_any_set_refers_to_them(
    support_sets: SupportSets, media_references: MediaReferences, database: Database, store: MediaStore
) -> None:
    async def is_referred_to(media: EncodedMedia) -> bool:
        return await database.read(lambda session, now: _is_referred_to(session, media.id))

    await support_sets.create("s", [example("a", RED), example("b", GREEN)])
    await support_sets.create("t", [example("a", GREEN)])
    await support_sets.remove_examples("s", ["a", "b"])
    await support_sets.sweep()
    assert await is_referred_to(RED)  # by version 1
    with pytest.raises(MediaInUse):
        await media_references.delete(RED.id)
    await support_sets.delete("s")
    assert not await is_referred_to(RED)
    assert await is_referred_to(GREEN)
    await support_sets.sweep()
    assert (store.exists(RED.id), store.exists(GREEN.id)) == (False, True)


async def test_uploaded_media_stay_until_their_client_deletes_them(
    support_sets: SupportSets, media_references: MediaReferences, store: MediaStore
) -> None:
    store.put(RED.data, "image")
    await support_sets.create("s", [example("a", store.find(RED.id), GREEN, BLUE)])
    await media_references.upload(BLUE, {})
    await support_sets.delete("s")
    await support_sets.sweep()
    assert [store.exists(m.id) for m in (RED, GREEN, BLUE)] == [True, False, True]
    await media_references.delete(RED.id)
    assert not store.exists(RED.id)
    with pytest.raises(MediaNotFound):
        await media_references.delete(RED.id)


async def test_a_deletion_that_is_tried_again_does_not_miss_the_file_that_it_has_deleted(
    media_references: MediaReferences, store: MediaStore
) -> None:
    await media_references.upload(RED, {})
    failures = [IntegrityError("COMMIT", {}, Exception("UNIQUE constraint failed"))]

    def fail_once(session: Session) -> None:
        if failures:
            raise failures.pop()

    event.listen(Session, "before_commit", fail_once)
    try:
        await media_references.delete(RED.id)
    finally:
        event.remove(Session, "before_commit", fail_once)
    assert (failures, store.exists(RED.id)) == ([], False)
    with pytest.raises(MediaNotFound):
        await media_references.delete(RED.id)


@pytest.mark.parametrize("step", ["_stored", "_put"])
async def test_media_uploaded_while_a_set_is_created_stay(
    support_sets: SupportSets,
    media_references: MediaReferences,
    store: MediaStore,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    """The upload follows `step` of storing: before the media row of the set is written, or after."""
    original, uploads = getattr(MediaReferences, step), [media_references.upload(RED, {})]

    def upload_after(self: MediaReferences, *arguments: Any) -> Any:
        result = original(self, *arguments)
        if uploads:
            asyncio.run(uploads.pop())
        return result

    with monkeypatch.context() as patched:
        patched.setattr(MediaReferences, step, upload_after)
        await support_sets.create("s", [example("a", RED)])
    await support_sets.create("t", [example("a", RED, GREEN)])
    await support_sets.delete("s")
    await support_sets.delete("t")
    await support_sets.sweep()
    assert [store.exists(m.id) for m in (RED, GREEN)] == [True, False]


async def test_concurrent_uploads_and_sets_that_refer_to_them(
    support_sets: SupportSets, media_references: MediaReferences, store: MediaStore
) -> None:
    many = [encoded(b"%d" % number, "image", "") for number in range(8)]

    uploads = [media_references.upload(media, {}) for media in many]
    creating = (support_sets.create(media.id, [example("a", media)]) for media in many)
    await asyncio.gather(*creating, *uploads)
    for media in many:
        await support_sets.delete(media.id)
    await support_sets.sweep()
    assert all(store.exists(media.id) for media in many)


@pytest.mark.parametrize("refused", [1, 2])
async def test_an_upload_that_the_database_refuses_leaves_no_file(
    media_references: MediaReferences,
    store: MediaStore,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    refused: int,
) -> None:
    """The database is away before the bytes are stored, or after."""
    write, number = Database.write, count(1)

    async def refuse(self: Database, transaction: Transaction[Any]) -> Any:
        if next(number) == refused:
            raise DatabaseUnavailable("the database is away")
        return await write(self, transaction)

    with monkeypatch.context() as patched:
        patched.setattr(Database, "write", refuse)
        with pytest.raises(DatabaseUnavailable):
            await media_references.upload(RED, {})
    assert store.exists(RED.id) == (refused == 2)
    clock.now += LEASE_SECONDS + 1
    await media_references.sweep()
    assert not store.exists(RED.id)


class EndlessDecoder:
    """Refuses one media item, and never ends with the others."""

    num_running = 0

    async def decode(self, media: EncodedMedia, job: Job) -> Frames:
        if media is RED:
            raise InvalidMedia("broken")
        self.num_running += 1
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            self.num_running -= 1


async def test_no_media_of_a_refused_request_are_decoded_any_longer(database: Database, store: MediaStore) -> None:
    decoder = EndlessDecoder()
    support_sets = SupportSets(database, MediaReferences(database, store, decoder))  # type: ignore[arg-type]
    with pytest.raises(InvalidMedia):
        await support_sets.create("s", [example("a", GREEN, BLUE, RED)])
    assert decoder.num_running == 0


async def test_bytes_of_referred_media_are_counted_once(
    support_sets: SupportSets, media_references: MediaReferences
) -> None:
    await media_references.upload(BLUE, {})
    assert (await support_sets.totals()).num_bytes == 0
    await support_sets.create("s", [example("a", RED, BLUE), example("b", RED)])
    assert (await support_sets.totals()).num_bytes == len(RED.data + BLUE.data)


async def test_media_of_a_request_in_progress_are_not_swept(
    support_sets: SupportSets, store: MediaStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = MediaStore.put
    is_stored = []

    def put_slowly(self: MediaStore, *arguments: Any, **keywords: Any) -> str:
        media_id = put(self, *arguments, **keywords)
        asyncio.run(support_sets.sweep())
        is_stored.append(store.exists(media_id))
        return media_id

    monkeypatch.setattr(MediaStore, "put", put_slowly)
    await support_sets.create("s", [example("a", RED, GREEN)])
    assert is_stored == [True, True]


async def test_media_stored_too_slowly_are_stored_again(
    support_sets: SupportSets, store: MediaStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = MediaStore.put
    delays = [1e6]

    def put_and_sweep(self: MediaStore, *arguments: Any, **keywords: Any) -> str:
        media_id = put(self, *arguments, **keywords)
        if delays:
            clock.now += delays.pop()
            asyncio.run(support_sets.sweep())
            assert not store.exists(media_id)
        return media_id

    monkeypatch.setattr(MediaStore, "put", put_and_sweep)
    await support_sets.create("s", [example("a", RED)])
    assert not delays
    assert store.get(RED.id).data == b"red"


async def test_stored_media_that_were_deleted_are_refused(support_sets: SupportSets, store: MediaStore) -> None:
    store.put(RED.data, "image")
    stored = store.find(RED.id, "examples[0].media[0].image_id")
    store.delete(RED.id)
    with pytest.raises(MediaNotFound):
        await support_sets.create("s", [example("a", stored)])
    with pytest.raises(SupportSetNotFound):
        await support_sets.get("s")


async def test_a_sweep_goes_on_after_files_that_cannot_be_deleted(
    support_sets: SupportSets, media_references: MediaReferences, database: Database, store: MediaStore
) -> None:
    many = [encoded(b"%d" % number, "image", "") for number in range(3 * MAX_FAILURES)]
    await support_sets.create("s", [example("a", *many)])
    stuck = sorted(media.id for media in many)[3 : MAX_FAILURES + 4]
    files = [Path(store._path(media_id)) for media_id in stuck]
    for file in files:
        file.unlink()
        file.mkdir()
    await support_sets.delete("s")
    await media_references.sweep()  # it ends after the last but one that cannot be deleted
    await media_references.sweep()
    rows = await database.read(lambda session, now: session.scalars(select(MediaRow.media_id)).all())
    assert sorted(rows) == stuck
    assert sorted(store.names()) == stuck
    for file in files:
        file.rmdir()
    await media_references.sweep()
    assert await database.read(lambda session, now: session.scalar(select(func.count()).select_from(MediaRow))) == 0


async def test_a_sweep_lets_other_writers_in(
    support_sets: SupportSets, media_references: MediaReferences, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer of SQLite in another process would find the file locked for the whole sweep."""
    await support_sets.create("s", [example("a", RED, GREEN, BLUE)])
    await support_sets.delete("s")
    pauses: list[float] = []
    sleep_really, loop = asyncio.sleep, asyncio.get_running_loop()

    async def sleep(seconds: float) -> None:
        if asyncio.get_running_loop() is not loop:  # of a server that other tests of this process have started
            await sleep_really(seconds)
            return
        pauses.append(seconds)

    monkeypatch.setattr(module, "MEDIA_PER_TRANSACTION", 1)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    await media_references.sweep()
    assert pauses == [SWEEP_PAUSE_SECONDS] * 3
