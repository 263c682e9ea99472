"""The database itself: what it is opened with, whom it refuses, and that work is done whole or not at all."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from model.checkpoint.native import save_folder
from server import __main__ as server_main
from server import logs
from server.errors import DatabaseUnavailable
from server.settings import Settings
from server.store import database as module
from server.store.database import Database, DatabaseError, SchemaVersion
from server.store.tables import EmbeddingRow
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model's folder for a server that is started in this process, whose logs stay as they are."""
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    config = CONFIGS["openflamingo"]
    save_folder(tmp_path / "model", config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    return str(tmp_path / "model")


def put(session: Session, key: str) -> None:
    session.execute(insert(EmbeddingRow).values(key=key, model="m", vector=b"", created_at=0.0))


def count(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(EmbeddingRow)) or 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "not a URL"),
        ("mysql://host/name", "no support for mysql"),
        ("postgresql+asyncpg://host/name", "no support for"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str, message: str) -> None:
    with pytest.raises(DatabaseError, match=message):
        Database(url)


def test_a_password_is_in_no_message() -> None:
    with pytest.raises(DatabaseError) as caught:
        Database("mysql://user:secret-word@host/name")
    assert "secret" not in str(caught.value)
    settings = Settings(database="postgresql://user:secret-word@host/name")  # type: ignore[arg-type]
    assert "secret" not in repr(settings) + settings.to_worker()


def test_sqlite_syncs_every_commit_and_holds_references(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'new' / 'folder' / 'data.db'}")
    for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
        assert database.read(lambda s, name=pragma: s.scalar(text(f"PRAGMA {name}"))) == value  # type: ignore[misc]
    database.close()


def test_a_newer_database_is_refused_and_left_alone(database: Database, database_url: str) -> None:
    database.write(lambda s: s.execute(update(SchemaVersion).values(version=module.SCHEMA_VERSION + 1)) and None)
    newer = Database(database_url)
    for _ in range(2):
        with pytest.raises(DatabaseError, match=r"tables are of version 2, this server knows up to 1"):
            newer.prepare()
    with pytest.raises(DatabaseError):
        newer.write(lambda session: put(session, "a"))
    newer.close()
    assert database.read(count) == 0


def test_the_server_does_not_start_on_a_newer_database(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'flamboyance.db'}")
    database.write(lambda s: s.execute(update(SchemaVersion).values(version=9)) and None)
    database.close()
    arguments = ["--model", model, "--data-dir", str(tmp_path), "--port", "0"]
    assert server_main.main(arguments) == 2
    assert "error: database: its tables are of version 9" in capsys.readouterr().err


def test_the_server_does_not_start_without_its_database(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"postgresql://user:secret-word@/name?host={tmp_path}"
    arguments = ["--model", model, "--database", url, "--data-dir", str(tmp_path)]
    assert server_main.main(arguments) == 2
    written = capsys.readouterr().err
    assert "error: database: the database does not answer" in written
    assert "secret" not in written


def test_tables_that_are_there_stay_as_they_are(database: Database, database_url: str) -> None:
    database.write(lambda session: put(session, "a"))
    again = Database(database_url)
    assert again.read(count) == 1
    again.close()


def test_work_that_raises_leaves_no_trace(database: Database) -> None:
    def work(session: Session) -> None:
        put(session, "a")
        raise KeyError

    with pytest.raises(KeyError):
        database.write(work)
    assert database.read(count) == 0


def test_a_reader_sees_one_moment(database: Database) -> None:
    def work(session: Session) -> list[int]:
        before = count(session)
        database.write(lambda other: put(other, "a"))
        return [before, count(session)]

    assert database.read(work) == [0, 0]
    assert database.read(count) == 1


def test_work_that_lost_a_race_is_done_again(database: Database) -> None:
    attempts = []

    def work(session: Session) -> str:
        attempts.append(1)
        found = session.scalar(select(EmbeddingRow.key).where(EmbeddingRow.key == "a"))
        if len(attempts) == 1:
            assert found is None
            put(session, "a")
            put(session, "a")  # as if another process had put it in between
        return "done"

    assert database.write(work) == "done"
    assert len(attempts) == 2


def test_a_conflict_that_never_ends_is_an_error(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 1e-4)

    def work(session: Session) -> None:
        put(session, "a")
        put(session, "a")

    with pytest.raises(IntegrityError):
        database.write(work)


def test_a_lost_connection_is_found_out(postgresql_url: str) -> None:
    database = Database(postgresql_url)
    database.prepare()
    others = text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query <> ''"
    )

    def cut(session: Session) -> None:
        session.execute(text("SELECT 1"))
        killer.write(lambda other: other.execute(others) and None)
        session.execute(text("SELECT 1"))

    killer = Database(postgresql_url)
    killer.prepare()
    with pytest.raises(DatabaseUnavailable):
        database.read(cut)
    database.write(lambda session: session.execute(delete(EmbeddingRow)) and None)
    assert database.read(count) == 0
    database.close()
    killer.close()


def test_a_database_that_is_locked_for_long_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.05)
    database = Database(f"sqlite:///{tmp_path / 'data.db'}")
    database.prepare()
    with sqlite3.connect(tmp_path / "data.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable):
            database.write(lambda session: put(session, "a"))
        assert database.read(count) == 0  # readers go on
        other.execute("COMMIT")
    other.close()
    database.write(lambda session: put(session, "a"))
    database.close()


def test_work_that_finds_no_connection_for_long_is_refused(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POOL", {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05})
    database = Database(database_url)
    database.prepare()

    def nested(session: Session) -> int:
        return count(session) + database.read(count)

    with pytest.raises(DatabaseUnavailable, match="too much work at once"):
        database.read(nested)
    assert database.read(count) == 0
    database.close()
