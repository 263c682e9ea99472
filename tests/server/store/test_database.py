"""The database: how it is opened, which ones it refuses, and that transactions are atomic."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from model.folder import save_folder
from server import start as server_main
from server.errors import DatabaseUnavailable
from server.settings import Settings
from server.store import database as module
from server.store.database import Database
from server.store.records import EmbeddingRow
from server.store.schema import DatabaseError
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

pytestmark = pytest.mark.anyio


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model's folder for a server that is started in this process."""
    config = CONFIGS["openflamingo"]
    save_folder(tmp_path / "model", config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    return str(tmp_path / "model")


def put(session: Session, key: str) -> None:
    session.execute(insert(EmbeddingRow).values(key=key, model="m", vector=b"", created_at=0.0))


def put_a(session: Session, now: float) -> None:
    put(session, "a")


def count(session: Session, now: float = 0.0) -> int:
    return session.scalar(select(func.count()).select_from(EmbeddingRow)) or 0


def set_version(session: Session, version: str) -> None:
    session.execute(text("UPDATE alembic_version SET version_num = :version"), {"version": version})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "expected a URL"),
        ("mysql://host/name", "mysql is not supported"),
        ("postgresql+asyncpg://host/name", "is not supported"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
    ],
)
def test_an_unusable_url_is_refused(url: str, message: str) -> None:
    with pytest.raises(DatabaseError, match=message):
        Database(url)


def test_no_message_contains_the_password() -> None:
    with pytest.raises(DatabaseError) as caught:
        Database("mysql://user:secret-word@host/name")
    assert "secret" not in str(caught.value)
    settings = Settings(database="postgresql://user:secret-word@host/name")
    assert "secret" not in repr(settings) + settings.to_worker()


async def test_sqlite_syncs_every_commit_and_enforces_references(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'new' / 'folder' / 'data.db'}")
    for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
        query = text(f"PRAGMA {pragma}")
        assert await database.read(lambda session, now, query=query: session.scalar(query)) == value  # type: ignore[misc]
    database.close()


async def test_a_newer_database_is_refused_and_left_alone(database: Database, database_url: str) -> None:
    await database.write(lambda session, now: set_version(session, "9999"))
    newer = Database(database_url)
    for _ in range(2):
        with pytest.raises(DatabaseError, match=r"schema has version 9999, this server supports 0001 to"):
            await newer.prepare()
    with pytest.raises(DatabaseError):
        await newer.write(put_a)
    newer.close()
    assert await database.read(count) == 0


def test_the_server_does_not_start_on_a_newer_database(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'flamboyance.db'}")
    asyncio.run(database.write(lambda session, now: set_version(session, "9999")))
    database.close()
    arguments = ["--model", model, "--data-dir", str(tmp_path), "--port", "0"]
    assert server_main.main(arguments) == 2
    assert "error: database: its schema has version 9999" in capsys.readouterr().err


def test_the_server_does_not_start_without_its_database(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"postgresql://user:secret-word@/name?host={tmp_path}"
    arguments = ["--model", model, "--database", url, "--data-dir", str(tmp_path)]
    assert server_main.main(arguments) == 2
    output = capsys.readouterr().err
    assert "error: database: the database does not respond" in output
    assert "secret" not in output


def test_a_second_server_does_not_start_on_the_same_folder(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    arguments = ["--model", model, "--data-dir", str(tmp_path / "data"), "--port", "0"]
    first = Database(settings.database_url, settings.database_setting)
    first.lock()
    assert server_main.main(arguments) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    used = f"{tmp_path / 'data' / 'flamboyance.db'} is in use by another server (process {os.getpid()})"
    assert error == f"error: data_dir: {used}; stop it, or choose another --data-dir"
    first.close()


async def test_existing_tables_stay_as_they_are(database: Database, database_url: str) -> None:
    await database.write(put_a)
    again = Database(database_url)
    assert await again.read(count) == 1
    again.close()


async def test_a_transaction_that_raises_leaves_no_trace(database: Database) -> None:
    def fail(session: Session, now: float) -> None:
        put(session, "a")
        raise KeyError

    with pytest.raises(KeyError):
        await database.write(fail)
    assert await database.read(count) == 0


async def test_a_read_sees_one_snapshot(database: Database) -> None:
    def read(session: Session, now: float) -> list[int]:
        before = count(session)
        asyncio.run(database.write(put_a))
        return [before, count(session)]

    assert await database.read(read) == [0, 0]
    assert await database.read(count) == 1


async def test_a_transaction_that_lost_a_race_is_retried(database: Database) -> None:
    attempts = []

    def write(session: Session, now: float) -> str:
        attempts.append(1)
        key = session.scalar(select(EmbeddingRow.key).where(EmbeddingRow.key == "a"))
        if len(attempts) == 1:
            assert key is None
            put(session, "a")
            put(session, "a")  # as if another process had put it in between
        return "done"

    assert await database.write(write) == "done"
    assert len(attempts) == 2


async def test_a_conflict_that_never_ends_is_an_error(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 1e-4)

    def write(session: Session, now: float) -> None:
        put(session, "a")
        put(session, "a")

    with pytest.raises(IntegrityError):
        await database.write(write)


async def test_a_write_that_has_begun_is_waited_for_when_its_caller_is_cancelled(database: Database) -> None:
    await database.prepare()
    has_begun, may_end = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def write(session: Session, now: float) -> None:
        loop.call_soon_threadsafe(has_begun.set)
        may_end.wait()
        put(session, "a")

    writing = asyncio.create_task(database.write(write))
    await has_begun.wait()
    writing.cancel()
    await asyncio.sleep(0.02)
    assert not writing.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await database.read(count) == 1


async def test_a_lost_connection_is_detected(postgresql_url: str) -> None:
    database = Database(postgresql_url)
    await database.prepare()
    terminate = text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query <> ''"
    )

    def cut(session: Session, now: float) -> None:
        session.execute(text("SELECT 1"))
        asyncio.run(killer.write(lambda other, now: other.execute(terminate) and None))
        session.execute(text("SELECT 1"))

    killer = Database(postgresql_url)
    await killer.prepare()
    with pytest.raises(DatabaseUnavailable):
        await database.read(cut)
    await database.write(lambda session, now: session.execute(delete(EmbeddingRow)) and None)
    assert await database.read(count) == 0
    database.close()
    killer.close()


async def test_a_database_that_stays_locked_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.05)
    database = Database(f"sqlite:///{tmp_path / 'data.db'}")
    await database.prepare()
    with sqlite3.connect(tmp_path / "data.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable, match=r"^the database is locked by another transaction$"):
            await database.write(put_a)
        assert await database.read(count) == 0  # readers are not blocked
        other.execute("COMMIT")
    other.close()
    await database.write(put_a)
    database.close()


async def test_writers_of_sqlite_do_not_wait_in_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would let a writer in that asks at the right moment, and others wait for seconds."""

    def write_slowly(session: Session, now: float) -> None:
        session.execute(text("SELECT 1"))
        time.sleep(0.02)

    monkeypatch.setattr(module, "BUSY_SECONDS", 0)
    database = Database(f"sqlite:///{tmp_path / 'data.db'}")  # its connections do not wait
    monkeypatch.undo()
    await database.prepare()
    await asyncio.gather(*(database.write(write_slowly) for _ in range(8)))
    database.close()


async def test_a_transaction_without_a_free_connection_is_refused(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POOL", {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05})
    database = Database(database_url)
    await database.prepare()

    def nested(session: Session, now: float) -> int:
        return count(session) + asyncio.run(database.read(count))

    with pytest.raises(DatabaseUnavailable, match="too many transactions at once"):
        await database.read(nested)
    assert await database.read(count) == 0
    database.close()


async def test_a_write_into_a_file_that_was_moved_away_is_not_acknowledged(sqlite: Database, tmp_path: Path) -> None:
    file, moved = tmp_path / "folder" / "data.db", tmp_path / "moved.db"
    await sqlite.write(put_a)
    file.rename(moved)
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable, match="the database file is missing"):
            await sqlite.write(lambda session, now: put(session, "b"))
    assert not file.exists()
    moved.rename(file)
    await sqlite.write(lambda session, now: put(session, "c"))
    assert await sqlite.read(count) == 2


async def test_a_file_that_is_moved_away_during_a_write_is_noticed(sqlite: Database, tmp_path: Path) -> None:
    def move(session: Session, now: float) -> None:
        put(session, "a")
        (tmp_path / "folder" / "data.db").rename(tmp_path / "moved.db")

    with pytest.raises(DatabaseUnavailable, match="missing"):
        await sqlite.write(move)


async def test_a_file_that_was_restored_is_opened_again(sqlite: Database, tmp_path: Path) -> None:
    file = tmp_path / "folder" / "data.db"
    await sqlite.write(put_a)
    other = Database(f"sqlite:///{tmp_path / 'other.db'}")
    await other.prepare()
    other.close()
    for suffix in ("-wal", "-shm"):  # as SQLite asks of a restore
        Path(f"{file}{suffix}").unlink()
    (tmp_path / "other.db").rename(file)
    assert await sqlite.read(count) == 0
    await sqlite.write(put_a)
    assert await sqlite.read(count) == 1


async def test_a_full_disk_is_named(sqlite: Database, caplog: pytest.LogCaptureFixture) -> None:
    def fill(session: Session, now: float) -> None:
        session.execute(text("PRAGMA max_page_count = 1"))  # the same error as a full disk's
        for number in range(1000):
            put(session, f"{number:0512}")

    with pytest.raises(DatabaseUnavailable, match="its disk is full"):
        await sqlite.write(fill)
    assert "its disk is full" in caplog.text


def overwrite(file: Path, byte: bytes) -> None:
    with file.open("r+b") as opened:
        opened.write(byte * file.stat().st_size)


@pytest.mark.parametrize("byte", [b"\xa5", b"\0"])
async def test_a_damaged_file_is_named_and_refused_until_it_is_replaced(
    byte: bytes, sqlite: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, wal = tmp_path / "folder" / "data.db", tmp_path / "folder" / "data.db-wal"
    await sqlite.write(put_a)
    overwrite(file, byte)
    overwrite(wal, byte)

    def read_from_a_new_connection(session: Session, now: float) -> int:
        return count(session) + asyncio.run(sqlite.read(count))

    with pytest.raises(DatabaseUnavailable, match="the database is damaged"):
        await sqlite.read(read_from_a_new_connection)
    assert [record.levelname for record in caplog.records if record.message == "the database is damaged"] == ["ERROR"]
    with pytest.raises(DatabaseUnavailable, match="the database is damaged"):
        await sqlite.write(lambda session, now: put(session, "b"))
    with pytest.raises(DatabaseUnavailable, match="the database is damaged"):
        await sqlite.read(count)
    other = Database(f"sqlite:///{tmp_path / 'other.db'}")
    await other.prepare()
    other.close()
    for suffix in ("-wal", "-shm"):
        Path(f"{file}{suffix}").unlink()
    (tmp_path / "other.db").rename(file)
    await sqlite.write(put_a)
    assert await sqlite.read(count) == 1


async def test_a_missing_table_is_reported_as_damage(database: Database) -> None:
    def drop(session: Session, now: float) -> None:
        session.execute(text("DROP TABLE embeddings"))

    await database.write(put_a)
    await database.write(drop)
    for transaction in (database.read(count), database.write(put_a)):
        with pytest.raises(DatabaseUnavailable, match="the database is damaged"):
            await transaction


async def test_a_slow_transaction_takes_no_thread_of_other_work(sqlite: Database) -> None:
    released = threading.Event()
    slow = [asyncio.create_task(sqlite.read(lambda session, now: released.wait(60))) for _ in range(40)]
    try:
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "other work"), 30) == "other work"
    finally:
        released.set()
        await asyncio.gather(*slow)


async def test_waiting_transactions_have_a_limit(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TRANSACTIONS", 3)
    released = threading.Event()
    slow = [asyncio.create_task(sqlite.read(lambda session, now: released.wait(60))) for _ in range(3)]
    await asyncio.sleep(0)
    try:
        with pytest.raises(DatabaseUnavailable, match="too many transactions"):
            await sqlite.read(count)
    finally:
        released.set()
        await asyncio.gather(*slow)
    assert await sqlite.read(count) == 0
