"""Backups: from SQLite and PostgreSQL to either, while the server writes, damaged, and of older servers."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import MetaData, select, text
from sqlalchemy.orm import Session

from server.media.store import MediaStore
from server.store import schema
from server.store.backup import MANIFEST, STORED, BackupError, restore_backup, write_backup
from server.store.database import Base, Database
from server.store.media_references import MediaReferences
from server.store.support_sets import SupportSets
from tests.server.store.conftest import BLUE, GREEN, RED, example

pytestmark = pytest.mark.anyio


@pytest.fixture
def other_store(tmp_path: Path) -> MediaStore:
    return MediaStore(str(tmp_path / "other media"))


@pytest.fixture(params=["sqlite", "postgresql"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database of either kind."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'other.db'}")
    else:
        database = Database(request.getfixturevalue("another_schema"))
    yield database
    database.close()


@pytest.fixture
async def sets(database: Database, store: MediaStore) -> SupportSets:
    sets = SupportSets(database, MediaReferences(database, store))
    await sets.create("colours", [example("a", RED, metadata={"n": [1, "ü"]}), example("b", GREEN)])
    await sets.put_examples("colours", [example("a", BLUE)])
    return sets


async def contents(database: Database) -> dict[str, list[tuple[object, ...]]]:
    """Return all rows of all tables."""

    def read(session: Session, now: float) -> dict[str, list[tuple[object, ...]]]:
        metadata = MetaData()
        metadata.reflect(session.connection())
        return {
            name: sorted((tuple(row) for row in session.execute(select(table))), key=repr)
            for name, table in metadata.tables.items()
            if name in STORED
        }

    return await database.read(read)


async def test_a_restored_database_is_the_same(
    sets: SupportSets, database: Database, store: MediaStore, other: Database, other_store: MediaStore, tmp_path: Path
) -> None:
    written = await write_backup(tmp_path / "backup.tar", database, store)
    assert written.missing == []
    assert await restore_backup(tmp_path / "backup.tar", other, other_store) == written
    assert await contents(other) == await contents(database)
    assert {media_id: other_store.get(media_id).data for media_id in other_store.names()} == {
        media.id: media.data for media in (RED, GREEN, BLUE)
    }


async def test_the_media_of_all_tenants_are_restored(
    sets: SupportSets, database: Database, store: MediaStore, other: Database, other_store: MediaStore, tmp_path: Path
) -> None:
    of_acme = sets.of("acme", MediaReferences(database, store).of(store.of("acme")))
    await of_acme.create("colours", [example("z", RED)])
    written = await write_backup(tmp_path / "backup.tar", database, store)
    assert (written.num_media, written.missing) == (4, [])
    await restore_backup(tmp_path / "backup.tar", other, other_store)
    assert await contents(other) == await contents(database)
    assert [list(other_store.of(tenant).names()) for tenant in ("acme", "unheard-of")] == [[RED.id], []]
    assert len(list(other_store.names())) == 3
    restored = SupportSets(other, MediaReferences(other, other_store))
    assert len((await restored.get_version("colours")).examples) == 2
    restored = restored.of("acme", MediaReferences(other, other_store.of("acme")))
    assert [each.id for each in (await restored.get_version("colours")).examples] == ["z"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "A/x", "tenants/acme/x", "acme\n"])
async def test_a_backup_writes_no_file_outside_the_store(
    sets: SupportSets, database: Database, store: MediaStore, other: Database, tmp_path: Path, name: str
) -> None:
    await write_backup(tmp_path / "backup.tar", database, store)
    with tarfile.open(tmp_path / "backup.tar") as written, tarfile.open(tmp_path / "evil.tar", "w") as evil:
        for member in written.getmembers():
            content = written.extractfile(member)
            if member.name == f"media/{RED.id}":
                member.name = f"media/{name}/{RED.id}"
            evil.addfile(member, content)
    with pytest.raises(BackupError, match="damaged"):
        await restore_backup(tmp_path / "evil.tar", other, MediaStore(str(tmp_path / "new" / "store")))
    assert not [file for file in tmp_path.rglob(RED.id) if tmp_path / "media" not in file.parents]


async def test_a_restored_set_is_changed_as_before(
    sets: SupportSets, database: Database, store: MediaStore, other: Database, other_store: MediaStore, tmp_path: Path
) -> None:
    await write_backup(tmp_path / "backup.tar", database, store)
    await restore_backup(tmp_path / "backup.tar", other, other_store)
    restored = SupportSets(other, MediaReferences(other, other_store))
    await restored.put_examples("colours", [example("c", RED)])
    assert [each.id for each in (await restored.get_version("colours")).examples] == ["a", "b", "c"]
    first = (await restored.get_version("colours", 1)).examples
    assert (json.loads(first[0].metadata_json), first[0].media) == ({"n": [1, "ü"]}, (RED.id,))


def test_every_table_is_stored_or_left_out_for_a_reason() -> None:
    assert {*Base.metadata.tables} == STORED | {"media_leases"}


async def test_tables_of_others_stay_where_they_are(
    sets: SupportSets, database: Database, store: MediaStore, other: Database, other_store: MediaStore, tmp_path: Path
) -> None:
    def add_table(session: Session, now: float) -> None:
        session.execute(text("CREATE TABLE of_others (a INT)"))
        session.execute(text("INSERT INTO of_others VALUES (1)"))

    await database.use_as_is(add_table, is_writing=True)
    await other.use_as_is(add_table, is_writing=True)
    written = await write_backup(tmp_path / "backup.tar", database, store)
    assert "of_others" not in written.rows
    await restore_backup(tmp_path / "backup.tar", other, other_store)


async def test_a_backup_is_for_its_user_alone_and_never_over_another(
    sets: SupportSets, database: Database, store: MediaStore, tmp_path: Path
) -> None:
    file = tmp_path / "backup.tar"
    results = await asyncio.gather(*(write_backup(file, database, store) for _ in range(3)), return_exceptions=True)
    assert sum(isinstance(result, BackupError) for result in results) == 2
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if "backup" in path.name] == ["backup.tar"]


async def test_a_table_that_was_cut_is_not_restored(
    sets: SupportSets, database: Database, store: MediaStore, other: Database, other_store: MediaStore, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    await write_backup(whole, database, store)
    for content in (b"", b"no JSON"):
        with tarfile.open(whole) as source, tarfile.open(cut, "w") as target:
            for member in source.getmembers():
                if member.name == "tables/examples":
                    member.size = len(content)
                    target.addfile(member, io.BytesIO(content))
                else:
                    target.addfile(member, source.extractfile(member))
        with pytest.raises(BackupError, match="is damaged"):
            await restore_backup(cut, other, other_store)


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("media", b'{"media_id": "x", "medium": 1}'),
        ("media", b'{"media_id": "x"}'),
        ("media", b'{"media_id": "\xff"}'),
        ("media", {"media_id": {"a": 1}}),
        ("media", {"num_bytes": 2**70}),
        ("media", {"media_id": None}),
        ("embeddings", {"vector": 5}),
        ("embeddings", {"vector": "é"}),
    ],
    ids=str,
)
async def test_a_row_that_the_table_cannot_have_is_damage(
    sets: SupportSets,
    database: Database,
    store: MediaStore,
    other: Database,
    other_store: MediaStore,
    tmp_path: Path,
    table: str,
    row: bytes | dict[str, object],
) -> None:
    """The error of the database has the values of the row, the message does not."""
    whole, damaged = tmp_path / "whole.tar", tmp_path / "damaged.tar"
    await write_backup(whole, database, store)
    if isinstance(row, dict):
        row = json.dumps({column.name: "" for column in Base.metadata.tables[table].columns} | row).encode()
    with tarfile.open(whole) as source, tarfile.open(damaged, "w") as target:
        for member in source.getmembers():
            content = source.extractfile(member)
            if member.name == f"tables/{table}":
                member.size, content = len(row), io.BytesIO(row)
            target.addfile(member, content)
    with pytest.raises(BackupError, match=r"^the backup is damaged: [\w ]+$") as refusal:
        await restore_backup(damaged, other, other_store)
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None


async def test_a_file_system_without_hard_links_is_named(
    sets: SupportSets, database: Database, store: MediaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(BackupError, match="has no hard links"):
        await write_backup(tmp_path / "backup.tar", database, store)
    assert not list(tmp_path.glob("*backup*"))


async def test_links_are_not_followed(other: Database, other_store: MediaStore, tmp_path: Path) -> None:
    file = tmp_path / "backup.tar"
    with tarfile.open(file, "w") as archive:
        link = tarfile.TarInfo(MANIFEST)
        link.type, link.linkname = tarfile.SYMTYPE, MANIFEST
        archive.addfile(link)
    with pytest.raises(BackupError):
        await restore_backup(file, other, other_store)


async def test_a_database_that_is_in_use_is_not_restored_over(
    sets: SupportSets, database: Database, store: MediaStore, tmp_path: Path
) -> None:
    await write_backup(tmp_path / "backup.tar", database, store)
    before = await contents(database)
    with pytest.raises(BackupError, match="it is not empty"):
        await restore_backup(tmp_path / "backup.tar", database, store)
    assert await contents(database) == before


async def test_a_snapshot_is_consistent_while_sets_are_created_and_deleted(
    sets: SupportSets, database: Database, store: MediaStore, other: Database, other_store: MediaStore, tmp_path: Path
) -> None:
    async def change(number: int) -> None:
        for turn in range(10):
            created = await sets.create(f"set {number} {turn}", [example("a", RED), example("b", GREEN)])
            if turn % 2:
                await sets.delete(created.id)

    changing = asyncio.gather(*map(change, range(3)))
    await asyncio.sleep(0.05)
    written = await write_backup(tmp_path / "backup.tar", database, store)
    await changing
    await restore_backup(tmp_path / "backup.tar", other, other_store)
    restored = SupportSets(other, MediaReferences(other, other_store))
    infos = await restored.page("", 100)
    assert len(infos) == written.rows["support_sets"]
    for info in infos:
        assert len((await restored.get_version(info.id)).examples) == info.num_examples == 2


async def test_a_picture_that_vanishes_is_named(
    sets: SupportSets, database: Database, store: MediaStore, tmp_path: Path
) -> None:
    store.delete(GREEN.id)
    written = await write_backup(tmp_path / "backup.tar", database, store)
    assert (written.missing, written.num_media) == ([GREEN.id], 2)


async def test_a_file_that_was_cut_off_is_no_backup(
    sets: SupportSets, database: Database, store: MediaStore, other: Database, other_store: MediaStore, tmp_path: Path
) -> None:
    file = tmp_path / "backup.tar"
    await write_backup(file, database, store)
    whole = file.read_bytes()
    for length in (0, 100, 3000, whole.index(MANIFEST.encode())):
        file.write_bytes(whole[:length])
        with pytest.raises(BackupError, match="is not a"):
            await restore_backup(file, other, other_store)


async def test_a_damaged_picture_is_not_restored(
    sets: SupportSets, database: Database, store: MediaStore, other: Database, other_store: MediaStore, tmp_path: Path
) -> None:
    file = tmp_path / "backup.tar"
    await write_backup(file, database, store)
    damaged = file.read_bytes().replace(b"\nred", b"\nrod")
    file.write_bytes(damaged)
    with pytest.raises(BackupError, match=RED.id):
        await restore_backup(file, other, other_store)
    assert (
        await other.use_as_is(lambda session, now: schema.read_revision(session.connection()), is_writing=False) is None
    )


def rewrite(file: Path, target: Path, *left_out: str, **fields: object) -> None:
    """Copy a backup without some members, and with other fields in its manifest."""
    with tarfile.open(file) as source, tarfile.open(target, "w") as archive:
        for member in source.getmembers():
            content = source.extractfile(member)
            assert content is not None
            data = content.read()
            if member.name == MANIFEST:
                data = json.dumps(json.loads(data) | fields).encode()
                member.size = len(data)
            if member.name not in left_out:
                archive.addfile(member, io.BytesIO(data))


async def test_a_backup_with_a_wrong_manifest_is_not_restored(
    sets: SupportSets, database: Database, store: MediaStore, other: Database, other_store: MediaStore, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    written = await write_backup(whole, database, store)
    without = {name: number for name, number in written.rows.items() if name != "examples"}
    cases: list[tuple[list[str], dict[str, object], str]] = [
        ([f"media/{RED.id}"], {}, "damaged: it has 2 media, and should have 3"),
        ([f"media/{RED.id}"], {"num_media": 2}, f"damaged: it lacks the media item {RED.id}"),
        ([], {"rows": {}}, "damaged: its tables are not those of"),
        (["tables/examples"], {}, "damaged: its tables are not those of backup.json: 'examples'"),
        (["tables/examples"], {"rows": without}, "damaged: it does not have the tables of a server: 'examples'"),
    ]
    for version in ("9999", "00035", "0000", ""):
        cases.append(([], {"schema": version}, "newer server, .*, or is damaged: its tables have version"))
    cases.append(([], {"format": 2}, "newer server, .*, or is damaged: it has the format 2, this server supports 1"))
    for left_out, fields, message in cases:
        rewrite(whole, cut, *left_out, **fields)
        with pytest.raises(BackupError, match=message):
            await restore_backup(cut, other, other_store)
        assert not await other.use_as_is(has_rows, is_writing=False)
    rewrite(whole, cut, f"media/{RED.id}", num_media=2, missing=[RED.id])
    await restore_backup(cut, other, other_store)


def has_rows(session: Session, now: float) -> bool:
    metadata = MetaData()
    metadata.reflect(session.connection())
    return any(session.execute(select(metadata.tables[name])).first() for name in STORED & metadata.tables.keys())


async def test_an_archive_from_elsewhere_is_no_backup(other: Database, other_store: MediaStore, tmp_path: Path) -> None:
    file = tmp_path / "backup.tar"
    for manifest in (b"", b"[]", b'{"format": 1}'):
        with tarfile.open(file, "w") as archive:
            entry = tarfile.TarInfo(MANIFEST)
            entry.size = len(manifest)
            archive.addfile(entry, io.BytesIO(manifest))
        with pytest.raises(BackupError, match="not a complete backup"):
            await restore_backup(file, other, other_store)


async def test_a_backup_of_an_older_server_is_upgraded(
    old_database: Database, store: MediaStore, other: Database, other_store: MediaStore, tmp_path: Path
) -> None:
    """The old database keeps its version: the old server can go on."""
    written = await write_backup(tmp_path / "backup.tar", old_database, store)
    assert written.schema == schema.FIRST
    await restore_backup(tmp_path / "backup.tar", other, other_store)

    def revision(session: Session, now: float) -> str | None:
        return schema.read_revision(session.connection())

    assert await old_database.use_as_is(revision, is_writing=False) == schema.FIRST
    assert await other.read(revision) == schema.NEWEST
    assert (await SupportSets(other, MediaReferences(other, other_store)).get("colours")).version == 3
    await old_database.prepare()
    assert await contents(other) == await contents(old_database)
