"""A backup that is taken while requests are in progress: it has what they have stored, and nothing is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.media.store import MediaStore
from server.store.backup import restore_backup, write_backup
from server.store.database import Database
from server.store.media_references import MediaReferences
from server.store.support_sets import SupportSets
from tests.server.store.conftest import BLUE, GREEN, RED, example

pytestmark = pytest.mark.anyio


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
