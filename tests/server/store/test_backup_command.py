"""`flamboyance backup` and `flamboyance restore`, as a user calls them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from server.media.store import MediaStore
from server.store import __main__ as backups
from server.store.database import Database
from server.store.media_references import MediaReferences
from server.store.support_sets import SupportSets
from tests.server.store.conftest import RED, example


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, data, other = tmp_path / "backup.tar", tmp_path / "data", tmp_path / "other"

    async def fill() -> None:
        database = Database(f"sqlite:///{data / 'flamboyance.db'}")
        sets = SupportSets(database, MediaReferences(database, MediaStore(str(data / "media"))))
        await sets.create("colours", [example("a", RED)])
        database.close()

    asyncio.run(fill())
    assert backups.main(["backup", str(file), "--data-dir", str(data)]) == 0
    assert "1 media, tables of version" in capsys.readouterr().out
    assert backups.main(["backup", "--data-dir", str(data), str(file)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert backups.main(["backup", "nowhere/backup.tar", "--data-dir", str(data)]) == 2
    assert capsys.readouterr().err == "error: there is no folder nowhere\n"
    assert backups.main(["restore", str(file), "--data-dir", str(other)]) == 0
    assert backups.main(["restore", str(file), "--data-dir", str(other)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert backups.main(["restore", "absent.tar", "--data-dir", str(tmp_path / "second")]) == 2
    assert capsys.readouterr().err == "error: there is no file absent.tar\n"
    assert not (tmp_path / "second").exists()
    running = Database(f"sqlite:///{tmp_path / 'third' / 'flamboyance.db'}", "data_dir")
    running.lock()
    assert backups.main(["restore", str(file), "--data-dir", str(tmp_path / "third")]) == 2
    assert "is in use by" in capsys.readouterr().err
    running.close()


def test_a_standard_stream_is_no_backup(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("backup", "restore"):
        with pytest.raises(SystemExit) as caught:
            backups.main([command, "-"])
        assert caught.value.code == 2
        assert "a backup is a file, and not a standard stream: give its name" in capsys.readouterr().err
