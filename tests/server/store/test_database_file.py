"""The file of a SQLite database: one server locks it, until it ends in whatever way, and notices if it is replaced."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from server.errors import DatabaseUnavailable
from server.settings import SettingsError
from server.store import database as module
from server.store.database import Database
from server.store.database_file import DatabaseFile

ROOT = Path(__file__).resolve().parents[3]
# locks a database, starts a process that outlives it, as a worker may for a moment, and waits
HOLDER = """
import subprocess, sys
from pathlib import Path
from server.store.database_file import DatabaseFile

file = DatabaseFile(Path(sys.argv[1]), "data_dir")
file.lock()
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=0)
print(child.pid, flush=True)
child.wait()
"""


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = (DatabaseFile(tmp_path / "new" / "data.db", "database") for _ in range(2))
    first.lock()
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(
            SettingsError, match=r"^database: .*data\.db is in use by another server \(process \d+\); stop it, or "
        ):
            second.lock()
    first.unlock()
    second.lock()
    second.unlock()


def test_a_file_has_one_lock_by_all_its_names(tmp_path: Path) -> None:
    link = tmp_path / "other" / "link.db"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "data.db")
    first, second = (DatabaseFile(path, "database") for path in (tmp_path / "data.db", link))
    first.lock()
    with pytest.raises(SettingsError, match=r"^database: .*link\.db is in use by another server"):
        second.lock()
    first.unlock()


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "data.db")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        file = DatabaseFile(tmp_path / "data.db", "data_dir")
        with pytest.raises(SettingsError, match=rf"\(process {holder.pid}\);"):
            file.lock()
        holder.kill()
        holder.wait()
        file.lock()  # although its child still runs
        file.unlock()


def test_a_lock_that_cannot_be_written_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "data.db.lock").mkdir()
    with pytest.raises(SettingsError, match=r"^data_dir: .*data\.db\.lock cannot be locked: Is a directory$"):
        DatabaseFile(tmp_path / "data.db", "data_dir").lock()


def test_a_lock_that_the_disk_cannot_hold_is_a_wrong_setting(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(SettingsError, match=r"^data_dir: .*data\.db\.lock cannot be locked: File too large$"):
            DatabaseFile(tmp_path / "data.db", "data_dir").lock()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.anyio
async def test_nothing_is_written_next_to_a_file_in_a_folder_that_can_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite would fail there, because it writes a log even to read."""
    file = tmp_path / "a #b" / "data.db"
    made = Database(f"sqlite:///{file}")
    await made.prepare()
    made.close()
    link = tmp_path / "link.db"
    link.symlink_to(file)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # which root always has
    count = text("SELECT count(*) FROM support_sets")
    for path in (file, link):
        database = Database(f"sqlite:///{path}")
        database.require()
        assert await database.use_as_is(lambda session, now: session.scalar(count), is_writing=False) == 0
        assert list(file.parent.iterdir()) == [file]
        database.close()


def test_servers_share_a_postgresql_database(tmp_path: Path) -> None:
    databases = [Database(f"postgresql://user@/name?host={tmp_path}") for _ in range(2)]
    for database in databases:
        database.lock()
    for database in databases:
        database.close()
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_and_a_new_file_are_private_and_another_folder_keeps_its_mode(tmp_path: Path) -> None:
    for name, is_new, mode in (("new", True, 0o700), ("old", False, 0o755)):
        folder = tmp_path / name
        if not is_new:
            folder.mkdir()
            folder.chmod(0o755)
        DatabaseFile(folder / "data.db", "data_dir").identity()
        assert folder.stat().st_mode & 0o777 == mode
        assert (folder / "data.db").stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_created_is_a_wrong_setting(tmp_path: Path) -> None:
    file = DatabaseFile(tmp_path / ("long" * 100), "database")
    with pytest.raises(SettingsError, match=r"^database: the database .* cannot be created: File name too long$"):
        file.identity()


@pytest.mark.anyio
async def test_no_write_into_a_replaced_file_is_acknowledged(tmp_path: Path) -> None:
    """It is not, although other transactions have already found the new file and opened it."""
    file, copy = tmp_path / "data.db", tmp_path / "copy.db"
    for path in (file, copy):
        made = Database(f"sqlite:///{path}")
        await made.prepare()
        made.close()
    database = Database(f"sqlite:///{file}")
    has_begun, may_end = threading.Event(), threading.Event()

    def write(session: Session, now: float) -> None:
        session.execute(text("CREATE TABLE written (x INTEGER)"))
        has_begun.set()
        may_end.wait(20)

    writing = asyncio.create_task(database.write(write))
    await asyncio.to_thread(has_begun.wait, 20)
    for suffix in ("-wal", "-shm"):  # as SQLite asks of a restore
        Path(f"{file}{suffix}").unlink()
    copy.rename(file)
    count = text("SELECT count(*) FROM sqlite_master WHERE name = 'written'")
    assert await database.read(lambda session, now: session.scalar(count)) == 0
    may_end.set()
    with pytest.raises(DatabaseUnavailable, match=r"^the database file was replaced$"):
        await writing
    database.close()


@pytest.mark.anyio
async def test_reads_do_not_wait_for_writers_that_wait_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NUM_THREADS", 2)
    database = Database(f"sqlite:///{tmp_path / 'data.db'}")
    await database.prepare()
    other = sqlite3.connect(tmp_path / "data.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    def select(session: Session, now: float) -> int:
        return session.scalar(text("SELECT 1")) or 0

    writing = [asyncio.create_task(database.write(select)) for _ in range(5)]
    await asyncio.sleep(0.1)  # they have begun
    assert await asyncio.wait_for(database.read(select), 5) == 1
    assert not any(write.done() for write in writing)
    other.execute("ROLLBACK")
    other.close()
    assert await asyncio.gather(*writing) == [1] * 5
    database.close()


@pytest.mark.anyio
async def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}")
    with pytest.raises(DatabaseUnavailable, match="the database file cannot be opened: this user must be able to"):
        await database.prepare()
    database.close()
