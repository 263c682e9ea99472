"""Backups in progress: while requests are in progress, too, nothing is missing; one that a signal ends leaves no file."""

from __future__ import annotations

import asyncio
import os
import signal
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
    store.put(GREEN.data, GREEN.kind)
    await references.mark_uploaded(GREEN.id, GREEN.num_bytes)
    await references._lease({media.id: media for media in (RED, BLUE)})
    written = await write_backup(tmp_path / "backup.tar", database, store)
    assert (written.missing, written.num_media, written.rows["media"]) == ([], 2, 2)
    restored = Database(f"sqlite:///{tmp_path / 'restored.db'}")
    await restore_backup(tmp_path / "backup.tar", restored, MediaStore(str(tmp_path / "restored")))
    restored.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_backup_that_a_signal_ends_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    async def fill() -> None:
        made = Database(f"sqlite:///{tmp_path / 'data' / 'flamboyance.db'}")
        await made.prepare()
        made.close()

    def end(*_: object) -> None:
        os.kill(os.getpid(), number)

    asyncio.run(fill())
    monkeypatch.setattr(backup, "_add", end)
    handler = signal.getsignal(number)
    try:
        with pytest.raises(SystemExit, match=str(128 + number)):
            raise SystemExit(backups.main(["backup", str(tmp_path / "b.tar"), "--data-dir", str(tmp_path / "data")]))
    finally:
        signal.signal(number, handler)
    assert not list(tmp_path.glob(".b.tar*"))
