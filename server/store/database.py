"""The database behind what clients store: SQLite in a file, or PostgreSQL by URL, through one SQLAlchemy engine.

Work is a function of a session, run whole in one transaction: `read` sees one moment, `write` commits or leaves no
trace. Calls block. What is acknowledged is on disk: SQLite runs with a write-ahead log and a sync at every commit.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, insert, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from server.errors import DatabaseUnavailable

# raised by one whenever a table changes; a database of a later number is not touched
SCHEMA_VERSION = 1
BUSY_SECONDS = 15
MAX_ATTEMPTS = 8
# connections of one process: more work than this waits for its turn
POOL = {"pool_size": 8, "max_overflow": 8, "pool_timeout": 30}
FIRST_PAUSE = 0.005
# any number will do, as long as every process of ours takes the same lock
SETUP_LOCK = 0x666C616D
# PostgreSQL's serialization_failure, deadlock_detected, foreign_key_violation and unique_violation: another transaction
# was quicker, and the same work succeeds or is refused for good when it sees what that one did
RETRIED_STATES = {"40001", "40P01", "23503", "23505"}

Result = TypeVar("Result")
Work = Callable[[Session], Result]

logger = logging.getLogger(__name__)


class DatabaseError(ValueError):
    """The database cannot be used by this version of the server, or the URL names none; the message says why."""


class Base(DeclarativeBase):
    """The root of every table."""


class SchemaVersion(Base):
    """One row: which version of the server's tables this database holds."""

    __tablename__ = "schema_version"

    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int]


class Database:
    """`url`: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`. Connects when first used, and prepares itself."""

    def __init__(self, url: str) -> None:
        self._engine = _engine(_parsed(url))
        self._writing = self._engine.execution_options(is_writing=True)
        self._reading = self._engine.execution_options(is_writing=False)
        self._is_prepared = False
        self._preparing = threading.Lock()

    @property
    def is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    def prepare(self) -> None:
        """Make the tables. Raises `DatabaseError` for a database of a newer server, `DatabaseUnavailable`."""
        with self._preparing:
            if not self._is_prepared:
                self._attempt(self._writing, _create_tables)
                self._is_prepared = True

    def read(self, work: Work[Result]) -> Result:
        """What `work` finds at one moment. Raises `DatabaseUnavailable`."""
        return self._run(self._reading, work)

    def write(self, work: Work[Result]) -> Result:
        """Run `work` and commit. It may run several times, where another process changed what it had read; so it must
        do nothing but talk to the session. Raises `DatabaseUnavailable`."""
        return self._run(self._writing, work)

    def close(self) -> None:
        self._engine.dispose()

    def _run(self, engine: Engine, work: Work[Result]) -> Result:
        if not self._is_prepared:
            self.prepare()
        return self._attempt(engine, work)

    def _attempt(self, engine: Engine, work: Work[Result]) -> Result:
        pause = FIRST_PAUSE
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                with Session(engine, expire_on_commit=False) as session, session.begin():
                    return work(session)
            except DBAPIError as error:
                if not _is_contention(error):
                    raise _refusal(error) from error
                if attempt == MAX_ATTEMPTS:
                    if isinstance(error, IntegrityError):  # nobody is quicker so often
                        raise
                    raise DatabaseUnavailable("the database is busy: too many writers at once") from error
            except PoolTimeout as error:
                raise DatabaseUnavailable("the database is busy: too much work at once") from error
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause *= 2
        raise AssertionError("the loop returns or raises")


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise DatabaseError("database: not a URL of the form sqlite:///FILE or postgresql://USER@HOST/NAME") from None
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise DatabaseError(f"database: no support for {parsed.drivername}, only sqlite and postgresql")
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise DatabaseError("database: a SQLite database needs a file, as in sqlite:////var/lib/flamboyance/data.db")
    return parsed


def _engine(url: URL) -> Engine:
    try:
        if url.drivername != "sqlite":
            engine = create_engine(url, isolation_level="READ COMMITTED", pool_pre_ping=True, **POOL)
            event.listen(engine, "begin", _begin_postgresql)
            return engine
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, **POOL)
    except (ImportError, NoSuchModuleError):
        raise DatabaseError("database: PostgreSQL needs the package psycopg: pip install 'psycopg[binary]'") from None
    event.listen(engine, "do_connect", _make_folder)
    event.listen(engine, "connect", _open_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _make_folder(_dialect: Any, _record: Any, arguments: list[Any], _keywords: dict[str, Any]) -> None:
    Path(arguments[0]).parent.mkdir(parents=True, exist_ok=True)


def _open_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, by their kind
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # a writer that began as a reader could find, too late, that another was quicker
    is_writing = connection.get_execution_options().get("is_writing", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    # a writer locks the rows that it goes by; a reader sees one moment
    if not connection.get_execution_options().get("is_writing", True):
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def _create_tables(session: Session) -> None:
    connection = session.connection()
    if connection.dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": SETUP_LOCK})
    Base.metadata.create_all(connection, tables=[SchemaVersion.__table__])  # type: ignore[list-item]
    found = session.scalar(select(SchemaVersion.version))
    if found is not None and found > SCHEMA_VERSION:
        raise DatabaseError(
            f"database: its tables are of version {found}, this server knows up to {SCHEMA_VERSION}: "
            "run the server that wrote it, or a later one"
        )
    Base.metadata.create_all(connection)
    if found is None:
        session.execute(insert(SchemaVersion).values(id=1, version=SCHEMA_VERSION))


def _is_contention(error: DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None)
    return state in RETRIED_STATES or "FOREIGN KEY" in str(error.orig) or "UNIQUE constraint" in str(error.orig)


def _refusal(error: DBAPIError) -> Exception:
    if isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated:
        logger.error("the database does not answer", extra={"error": str(error.orig).strip()})
        return DatabaseUnavailable("the database does not answer")
    return error
