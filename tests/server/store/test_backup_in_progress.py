"""Backups in progress: next to requests that add and delete media nothing is missing; a failure leaves no file."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
from pathlib import Path

import pytest

from server.media.store import MediaStore
from server.store import __main__ as backups
from server.store import backup
from server.store.backup import restore_backup, write_backup
from server.store.database import Database
from server.store.media_references import MediaReferences
from server.store.support_sets import SupportSets
from tests.server.store.conftest import BLUE, GREEN, RED, example


@pytest.mark.anyio
async def test_media_of_a_request_that_has_not_stored_them_are_not_missing(
    database: Database, store: MediaStore, tmp_path: Path
) -> None:
    references = MediaReferences(database, store)
    await SupportSets(database, references).create("colours", [example("a", RED)])
    await references.upload(GREEN, {})
    await references._lease({media.id: media for media in (RED, BLUE)}, "holder")
    written = await write_backup(tmp_path / "backup.tar", database, store)
    assert (written.missing, written.num_media, written.rows["media"]) == ([], 2, 2)
    restored = Database(f"sqlite:///{tmp_path / 'restored.db'}")
    await restore_backup(tmp_path / "backup.tar", restored, MediaStore(str(tmp_path / "restored")))
    restored.close()


@pytest.mark.anyio
async def test_media_that_are_deleted_meanwhile_are_neither_missing_nor_restored(
    database: Database, database_url: str, store: MediaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, last = sorted((RED, GREEN, BLUE), key=lambda media: media.id)
    for media in (first, second, last):
        await MediaReferences(database, store).upload(media, {})
    read, copied = MediaStore.get_file, list[str]()

    async def delete() -> None:
        of_client = Database(database_url)
        for media in (first, last):
            await MediaReferences(of_client, store).delete(media.id)
        of_client.close()

    def read_and_delete(store: MediaStore, media_id: str) -> bytes:
        content = read(store, media_id)
        copied.append(media_id)
        if media_id == first.id:
            client = threading.Thread(target=lambda: asyncio.run(delete()))
            client.start()
            client.join()
        return content

    monkeypatch.setattr(MediaStore, "get_file", read_and_delete)
    written = await write_backup(tmp_path / "backup.tar", database, store)
    assert (written.missing, written.rows["media"]) == ([], 1)
    assert copied == [first.id, second.id]  # each once
    restored, its_store = Database(f"sqlite:///{tmp_path / 'restored.db'}"), MediaStore(str(tmp_path / "restored"))
    await restore_backup(tmp_path / "backup.tar", restored, its_store)
    assert list(its_store.names()) == [second.id]
    restored.close()


async def create_database(folder: Path) -> None:
    made = Database(f"sqlite:///{folder / 'flamboyance.db'}")
    await made.prepare()
    made.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_backup_that_a_signal_ends_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def end(*_: object) -> None:
        os.kill(os.getpid(), number)

    asyncio.run(create_database(tmp_path / "data"))
    monkeypatch.setattr(backup, "_add", end)
    handler = signal.getsignal(number)
    try:
        with pytest.raises(SystemExit, match=str(128 + number)):
            raise SystemExit(backups.main(["backup", str(tmp_path / "b.tar"), "--data-dir", str(tmp_path / "data")]))
    finally:
        signal.signal(number, handler)
    assert not list(tmp_path.glob(".b.tar*"))


def test_a_file_on_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    asyncio.run(create_database(tmp_path / "data"))
    monkeypatch.setattr(backup, "_add", fail)
    file = tmp_path / "b.tar"
    assert backups.main(["backup", str(file), "--data-dir", str(tmp_path / "data")]) == 2
    assert capsys.readouterr().err == f"error: {file}: the backup cannot be written: No space left on device\n"
    assert not list(tmp_path.glob("*b.tar*"))
