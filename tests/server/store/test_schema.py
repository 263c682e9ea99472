"""Migrations: a new database has the tables of the server, and an older one is upgraded with its data."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, String, text
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from server.media.store import MediaStore
from server.quality.evaluation_store import Evaluations
from server.store import schema
from server.store.backup import write_backup
from server.store.database import Base, Database
from server.store.media_references import MediaReferences
from server.store.migrations.run import FOLDER
from server.store.support_sets import SupportSets

pytestmark = pytest.mark.anyio


def differences(session: Session, _now: float) -> list[object]:
    """Return what would have to change so that the database has the tables of the code."""
    options = {"include_name": _is_table_of_code, "compare_type": _has_other_type}
    context = MigrationContext.configure(session.connection(), opts=options)
    return list(compare_metadata(context, Base.metadata))


def _has_other_type(
    context: MigrationContext, _column: object, _of_code: object, in_database: TypeEngine[Any], in_code: TypeEngine[Any]
) -> bool | None:
    """Ignore the length of a text in SQLite, where it has no meaning; None leaves it to Alembic."""
    is_text = isinstance(in_database, String) and isinstance(in_code, String)
    return False if context.dialect.name == "sqlite" and is_text else None


def _is_table_of_code(name: str | None, kind: str, _parents: object) -> bool:
    return kind != "table" or name != "schema_version"


async def test_the_migrations_make_the_tables_of_the_code(database: Database) -> None:
    assert await database.read(differences) == []


async def test_an_upgraded_database_has_the_tables_of_the_code(old_database: Database) -> None:
    assert await old_database.read(differences) == []


async def test_an_upgraded_database_has_its_data(old_database: Database, store: MediaStore) -> None:
    await old_database.prepare()
    sets = SupportSets(old_database, MediaReferences(old_database, store))
    colours = await sets.get("colours")
    assert (colours.version, colours.label_counts) == (3, {"red": 2, "green": 3, "blue": 1})
    first = await sets.get_version("colours", 1)
    assert [example.id for example in first.examples] == ["e0", "e1", "e2", "e3", "e4", "e5"]
    (evaluation,) = await Evaluations(old_database).page(None, "", 10)
    assert (evaluation.status, evaluation.queries_done) == ("completed", 24)
    assert len((await Evaluations(old_database).get(evaluation.id)).cells) == 4


async def test_an_upgraded_database_takes_new_data(old_database: Database) -> None:
    evaluations = Evaluations(old_database)
    created = await evaluations.create("colours", 3, {}, "client")
    assert (await evaluations.get(created.id)).status == "queued"


async def test_a_migration_that_fails_changes_nothing(old_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(connection: Connection, target: str = "") -> None:
        upgrade(connection, target or schema.NEWEST)
        raise RuntimeError("the disk of the server fell out")

    upgrade = schema.upgrade
    with monkeypatch.context() as broken:
        broken.setattr(schema, "upgrade", fail)
        with pytest.raises(RuntimeError):
            await old_database.prepare()
        broken.setattr(schema, "upgrade", lambda connection: None)
        assert await old_database.read(revision) == schema.FIRST


def revision(session: Session, _now: float) -> str | None:
    return schema.read_revision(session.connection())


@pytest.mark.parametrize("version", ["0000", "00035", "9999", ""])
async def test_a_database_of_an_unknown_version_is_refused(database: Database, database_url: str, version: str) -> None:
    def set_version(session: Session, now: float) -> None:
        session.execute(text("UPDATE alembic_version SET version_num = :version"), {"version": version})

    await database.write(set_version)
    other = Database(database_url)
    with pytest.raises(
        schema.DatabaseError, match=f"^database: its schema has version {version}, this server supports"
    ):
        await other.prepare()
    other.close()


async def test_a_database_of_a_newer_server_is_not_backed_up(
    database: Database, store: MediaStore, tmp_path: Path
) -> None:
    await database.write(lambda session, now: session.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    with pytest.raises(schema.DatabaseError, match="its schema has version 9999"):
        await write_backup(tmp_path / "backup.tar", database, store)
    assert not (tmp_path / "backup.tar").exists()


async def test_a_server_from_before_the_migrations_refuses_an_upgraded_database(old_database: Database) -> None:
    version = text("SELECT version FROM schema_version")
    assert await old_database.read(lambda session, now: session.scalar(version)) == 2  # it supports up to 1


def test_the_newest_migration_is_the_version_of_the_server() -> None:
    scripts = ScriptDirectory(str(FOLDER))
    revisions = [script.revision for script in scripts.walk_revisions()]
    assert tuple(revisions[::-1]) == schema.REVISIONS
    assert revisions == sorted(revisions, reverse=True)  # versions are compared as texts


async def test_two_servers_upgrade_a_database_once(old_database: Database, database_url: str) -> None:
    servers = [Database(database_url) for _ in range(4)]
    await asyncio.gather(*(database.prepare() for database in (old_database, *servers)))
    assert await old_database.read(revision) == schema.NEWEST
    for database in servers:
        database.close()
