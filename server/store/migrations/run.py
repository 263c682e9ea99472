"""Runs migrations with Alembic. Imported only if there is something to migrate, because the import is slow."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

FOLDER = Path(__file__).parent


def migrate(connection: Connection, revision: str, target: str) -> None:
    """Bring tables of version `revision` ("base" if there are none) to `target`, in the connection's transaction."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(FOLDER))
    config.set_main_option("path_separator", "os")
    command.stamp(config, revision)  # databases from before the migrations have no stamp
    command.upgrade(config, target)
