"""Creates or upgrades the tables of a database to the version of this server.

Alembic runs the files in `migrations/versions` that the database lacks, in order, in one transaction. A database that a
newer server has upgraded is refused. A migration removes nothing that the previous version uses, so that servers of two
versions can share a database while they are replaced.
"""

from __future__ import annotations

import logging
from importlib import import_module

from sqlalchemy import Connection, inspect, text

from server.settings import SettingsError

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006")
NEWEST = REVISIONS[-1]
# the tables of databases that were created before there were migrations
FIRST = REVISIONS[0]

logger = logging.getLogger(__name__)


class DatabaseError(SettingsError):
    """The database cannot be used by this version of the server, or the URL is invalid; the message says why."""


def upgrade(connection: Connection, target: str = NEWEST) -> None:
    """Run the migrations up to `target` within the connection's transaction. Raises `DatabaseError` for unknown ones."""
    revision = read_known(connection)
    if revision is None or revision < target:
        import_module("server.store.migrations.run").migrate(connection, revision or "base", target)
    if revision is not None and revision < target:
        logger.info("the database was upgraded", extra={"from": revision, "to": target})


def read_known(connection: Connection) -> str | None:
    """Return the version of the tables, None if there are none. Raises `DatabaseError` for that of a newer server."""
    revision = read_revision(connection)
    if revision is not None and revision not in REVISIONS:
        raise DatabaseError(
            f"database: its schema has version {revision[:80]}, this server supports {FIRST} to {NEWEST}: "
            "run the server that upgraded it, or a later one"
        )
    return revision


def require_newest(connection: Connection) -> None:
    """Raise `DatabaseError` for tables that a server would upgrade."""
    revision = read_known(connection)
    if revision is not None and revision != NEWEST:
        raise DatabaseError(
            f"database: its schema has version {revision}, and the server upgrades it to {NEWEST} when it starts: back it "
            "up and start the server first, or use the commands of the server that runs on it"
        )


def read_revision(connection: Connection) -> str | None:
    """Return the version of the tables, None if there are none."""
    tables = inspect(connection)
    if tables.has_table("alembic_version"):
        return connection.scalar(text("SELECT version_num FROM alembic_version"))
    return FIRST if tables.has_table("schema_version") else None
