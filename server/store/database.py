"""The database for all data that clients store: SQLite in a file, or PostgreSQL by URL, with SQLAlchemy.

A transaction is a function of a session and the current time. `read` runs it on one snapshot; `write` commits it atomically
and durably: SQLite uses a write-ahead log and syncs at every commit.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sqlalchemy import Connection, Dialect, Double, Engine, ExceptionContext, create_engine, event, exc, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.orm import DeclarativeBase, Session

from server.errors import DatabaseUnavailable
from server.setting_values import MAX_PORT
from server.store import schema
from server.store.database_file import DatabaseFile, Identity
from server.store.failures import LOCKED, is_contention, is_damage, is_read_only, refusal
from server.store.schema import DatabaseError
from server.store.threads import SharedThreads

BUSY_SECONDS = 15
MAX_ATTEMPTS = 8
# Transactions run in dedicated threads, so a slow database delays no other work. A client may have half of them; in SQLite,
# where a transaction holds the interpreter for most of its time, two. If too many transactions wait, the next one fails.
NUM_THREADS, NUM_THREADS_OF_CLIENT, MAX_TRANSACTIONS, MAX_WAITING_OF_CLIENT = 16, 2, 512, 384
# one connection for each thread: those of SQLite's writers are additional
POOL = {"pool_size": 8, "max_overflow": 2 * NUM_THREADS - 8, "pool_timeout": 30}
write_json = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))  # no larger than in a request
# a PostgreSQL server that does not respond fails a transaction in this time
POSTGRESQL_CONNECTION = {"connect_timeout": 10, "keepalives_idle": 10, "tcp_user_timeout": 60_000}
POSTGRESQL_SESSION = "SET statement_timeout = '60s'; SET lock_timeout = '15s'"
TRANSACTION_SECONDS = 65  # the same for one that hangs with its connections, which no timeout of its own ends
CLOSING_SECONDS = 3  # for running transactions at the end of the process
FIRST_PAUSE = 0.005
# arbitrary numbers, the same in every process of this server
SETUP_LOCK, TENANT_LOCK = 0x666C616D, 0x666C6174
# parameters of one statement: SQLite accepts 32766
MAX_PARAMETERS = 1000
# seconds between two transactions of a sweep: a writer of SQLite in another process tries again every 0.1 seconds
SWEEP_PAUSE_SECONDS = 0.12

Result = TypeVar("Result")
Item = TypeVar("Item")
Transaction = Callable[[Session, float], Result]

logger = logging.getLogger(__name__)


class Base(DeclarativeBase):
    """The base class of every table."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {float: Double()}


class Database:
    """A database by its URL: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`. It connects on first use.

    `setting` is the name of the setting with the path of a SQLite file, for error messages.
    """

    def __init__(self, url: str, setting: str = "database") -> None:
        parsed = _parsed(url)
        self._file = DatabaseFile(Path(str(parsed.database)), setting) if parsed.drivername == "sqlite" else None
        self._engine = _postgresql(parsed) if self._file is None else _sqlite(parsed, self._file)
        if self._file is None:
            self._threads = self._writers = SharedThreads(NUM_THREADS, NUM_THREADS // 2, "database")
        else:  # SQLite's writers wait for each other and for other processes, which its readers need not
            self._threads = SharedThreads(NUM_THREADS, NUM_THREADS_OF_CLIENT, "database")
            self._writers = SharedThreads(NUM_THREADS, NUM_THREADS_OF_CLIENT, "database writer", rest=0.0)
        self._timeouts: set[asyncio.Timeout] = set()
        self._closes_at = math.inf
        self._num_transactions = 0
        self._writing = self._engine.execution_options(is_writing=True)
        self._reading = self._engine.execution_options(is_writing=False)
        # the file to which the connections belong
        self._identity: Identity | None = None
        self._is_prepared = False
        self._preparing = threading.Lock()
        # held by the writer of this file
        self._turn = threading.Lock()

    def lock(self) -> None:
        """Lock the file of a SQLite database against other servers. Raises `SettingsError` if one uses it."""
        if self._file is not None:
            self._file.lock()

    def require(self) -> None:
        """Check that there is a database, before a connection creates its file. Raises `SettingsError`."""
        if self._file is not None:
            self._file.require()

    async def prepare(self) -> None:
        """Create or upgrade the tables. Raises `DatabaseError` for a newer server's database, and `DatabaseUnavailable`."""
        await self._in_thread(self._writers, self._prepare)

    async def read(self, transaction: Transaction[Result]) -> Result:
        """Run `transaction` on one snapshot. Raises `DatabaseUnavailable`."""
        return await self._bounded(self._reading, transaction)

    async def write(self, transaction: Transaction[Result]) -> Result:
        """Run `transaction` and commit it. Raises `DatabaseUnavailable`.

        It is retried if another process has changed the rows that it read, so it must have no effects outside the
        session. If the caller is cancelled, a transaction that has begun is still completed. If PostgreSQL hangs, the
        transaction may be committed later.
        """
        writing = asyncio.ensure_future(self._bounded(self._writing, transaction))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})
            if not writing.cancelled():
                writing.exception()  # asyncio would log it as not retrieved
            raise

    async def sweep(self, delete_some: Transaction[object]) -> None:
        """Write with `delete_some` until its result is false. Others write in the pauses. Raises `DatabaseUnavailable`."""
        while await self.write(delete_some):
            await asyncio.sleep(SWEEP_PAUSE_SECONDS)

    async def use_as_is(self, transaction: Transaction[Result], *, is_writing: bool) -> Result:
        """Run `transaction` on the tables as they are, of any version or missing. Raises `DatabaseUnavailable`."""
        engine = self._writing if is_writing else self._reading
        return await self._in_thread(self._threads, self._attempt, engine, transaction)

    def end_soon(self) -> None:
        """Give all transactions on PostgreSQL a few seconds from now on: a server that hangs must not delay the end."""
        self._closes_at = asyncio.get_running_loop().time() + CLOSING_SECONDS
        for timeout in self._timeouts:
            if not timeout.expired():
                timeout.reschedule(self._closes_at)

    def close(self) -> None:
        """Close the connections; transactions that still run after a few seconds are left to the end of the process."""
        end = time.monotonic() + CLOSING_SECONDS
        for threads in (self._threads, self._writers):
            threads.close(end - time.monotonic())
        self._engine.dispose()
        if self._file is not None:
            self._file.unlock()

    async def _bounded(self, engine: Engine, transaction: Transaction[Result]) -> Result:
        """Run a transaction; on PostgreSQL within some time. Raises `DatabaseUnavailable`."""
        if self._file is not None:
            threads = self._writers if engine is self._writing else self._threads
            return await self._in_thread(threads, self._run, engine, transaction)
        if not self._is_prepared:  # an upgrade takes its time
            await self.prepare()
        end = asyncio.get_running_loop().time() + TRANSACTION_SECONDS
        timeout = asyncio.timeout_at(min(end, self._closes_at))
        self._timeouts.add(timeout)
        try:
            async with timeout:
                return await self._in_thread(self._threads, self._run, engine, transaction)
        except TimeoutError:
            if not timeout.expired():
                raise
            logger.error("the database does not respond")
            raise DatabaseUnavailable("the database does not respond") from None
        finally:
            self._timeouts.discard(timeout)

    async def _in_thread(self, threads: SharedThreads, function: Callable[..., Result], *arguments: Any) -> Result:
        num_waiting = threads.num_waiting()  # if it is 0, as for the reading of API keys, the client may always wait
        if num_waiting >= MAX_WAITING_OF_CLIENT or (num_waiting and self._num_transactions >= MAX_TRANSACTIONS):
            raise DatabaseUnavailable("the database is busy: too many transactions at once")
        self._num_transactions += 1
        try:
            return await threads(function, *arguments)
        finally:
            self._num_transactions -= 1

    def _run(self, engine: Engine, transaction: Transaction[Result]) -> Result:
        identity = self._prepare()
        result = self._attempt(engine, transaction, identity)
        # each transaction asks for itself: another one may have opened the new file meanwhile
        if self._file is not None and self._file.identity() != identity:
            raise DatabaseUnavailable("the database file was replaced")
        return result

    def _prepare(self) -> Identity | None:
        """Open a file that has replaced the previous one, upgrade the tables once, and return the identity of the file."""
        with self._preparing:
            if self._file is not None:
                identity = self._file.identity()
                if identity != self._identity:
                    self._engine.dispose()
                    self._identity, self._is_prepared, self._turn = identity, False, threading.Lock()
                self._file.require_undamaged(identity)
            if not self._is_prepared:
                self._attempt(self._writing, _upgrade, self._identity)
                self._is_prepared = True
            return self._identity

    def _attempt(self, engine: Engine, transaction: Transaction[Result], identity: Identity | None = None) -> Result:
        pause = FIRST_PAUSE
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                with self._turn_of(engine), Session(engine, expire_on_commit=False) as session, session.begin():
                    return transaction(session, time.time())
            except exc.DBAPIError as error:
                if not is_contention(error):
                    if self._file is not None and is_damage(error):
                        self._file.mark_damaged(identity)
                    raise refusal(error) from error
                if attempt == MAX_ATTEMPTS:
                    if isinstance(error, exc.IntegrityError):  # concurrent transactions do not cause it that often
                        raise
                    raise DatabaseUnavailable("the database is busy: too many writers at once") from error
            except exc.TimeoutError as error:
                raise DatabaseUnavailable("the database is busy: too many transactions at once") from error
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause *= 2
        raise AssertionError("the loop returns or raises")

    @contextmanager
    def _turn_of(self, engine: Engine) -> Iterator[None]:
        """Let the writers of a SQLite file take turns: those that wait in SQLite try again only every 0.1 seconds."""
        if self._file is None or engine is self._reading:
            yield
            return
        turn = self._turn
        if not turn.acquire(timeout=BUSY_SECONDS):
            logger.error(LOCKED)
            raise DatabaseUnavailable(LOCKED)
        try:
            yield
        finally:
            turn.release()


def new_id(prefix: str, last: str | None = None) -> str:
    """Return a unique id that sorts by the time of its creation, and after the id `last`, if the clock was set back."""
    moment = time.time_ns() // 1_000_000
    if last is not None:
        moment = max(moment, round(made_at(last) * 1000) + 1)
    return f"{prefix}{moment:012x}{uuid.uuid4().hex[:16]}"


def made_at(row_id: str) -> float:
    """Return the time at which `new_id` made an id, in seconds; infinity for another text."""
    try:
        return int(row_id.rpartition("_")[2][:12], 16) / 1000
    except ValueError:
        return math.inf


def chunked(values: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Yield slices of `values` that fit into the parameters of one statement."""
    for start in range(0, len(values), MAX_PARAMETERS):
        yield values[start : start + MAX_PARAMETERS]


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):  # the latter for a port that is not a number
        raise DatabaseError(
            "database: expected a URL of the form sqlite:///FILE or postgresql://USER@HOST:PORT/NAME"
        ) from None
    if "@" in (parsed.host or ""):  # the end of a password: an error of the driver would have it
        raise DatabaseError("database: the URL has more than one @: write one in a user or a password as %40")
    if parsed.port is not None and not 1 <= parsed.port <= MAX_PORT:
        raise DatabaseError(f"database: {parsed.port} is not a port: expected a number from 1 to {MAX_PORT}")
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise DatabaseError(f"database: {parsed.drivername} is not supported, only sqlite and postgresql")
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise DatabaseError("database: a SQLite database needs a file, as in sqlite:////var/lib/flamboyance/data.db")
    return parsed


def _postgresql(url: URL) -> Engine:
    # the URL takes precedence
    options = {name: value for name, value in POSTGRESQL_CONNECTION.items() if name not in url.query}
    try:
        engine = _engine(url, isolation_level="READ COMMITTED", pool_pre_ping=True, connect_args=options)
    except (ImportError, exc.NoSuchModuleError):
        raise DatabaseError("database: PostgreSQL needs the package psycopg: pip install 'psycopg[binary]'") from None
    event.listen(engine, "do_connect", _connect_postgresql)
    event.listen(engine, "connect", _open_postgresql)
    event.listen(engine, "begin", _begin_postgresql)
    event.listen(engine, "handle_error", _replace_connections)
    return engine


def _sqlite(url: URL, file: DatabaseFile) -> Engine:
    engine = _engine(url, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "do_connect", lambda *arguments: _connect_sqlite(file, *arguments))
    event.listen(engine, "connect", _open_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _engine(url: URL, **options: Any) -> Engine:
    try:
        return create_engine(url, json_serializer=write_json, **options, **POOL)
    except (exc.ArgumentError, ValueError) as error:
        raise DatabaseError(f"database: the URL has a wrong option: {error}") from None


def _connect_postgresql(dialect: Dialect, _record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    try:
        connection = dialect.connect(*arguments, **options)
    except dialect.loaded_dbapi.ProgrammingError as error:  # before it connects
        raise DatabaseError(f"database: the URL has a wrong option: {str(error).strip()}") from None
    if (encoding := connection.info.parameter_status("server_encoding")) != "UTF8":
        connection.close()
        raise DatabaseError(f"database: its encoding is {encoding}; create one with ENCODING 'UTF8' TEMPLATE template0")
    return connection


def _connect_sqlite(
    file: DatabaseFile, _dialect: Dialect, _record: Any, _arguments: list[Any], options: dict[str, Any]
) -> sqlite3.Connection | None:
    if file.immutable_uri is not None:
        return sqlite3.connect(file.immutable_uri, uri=True, **options)
    file.create_folder()
    return None  # SQLAlchemy connects


def _open_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun explicitly, see _begin_sqlite
    _use_write_ahead_log(connection)
    for pragma in ("synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch the file to a write-ahead log, which lasts.

    SQLite fails at once, without the wait of `BUSY_SECONDS`, while another connection switches the same new file.
    """
    last = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= last:
                raise
        time.sleep(FIRST_PAUSE)


def _open_postgresql(connection: Any, _record: Any) -> None:
    connection.execute(POSTGRESQL_SESSION)
    connection.commit()


def _replace_connections(context: ExceptionContext) -> None:
    """Replace all pooled connections if one can only read: it keeps the setting that its database had when it was made."""
    context.is_disconnect = context.is_disconnect or is_read_only(context.original_exception)


def _begin_sqlite(connection: Connection) -> None:
    # a writer that began as a reader would fail if another writer committed in between
    is_writing = connection.get_execution_options().get("is_writing", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    # a writer locks the rows that it depends on; a reader sees one snapshot
    if not connection.get_execution_options().get("is_writing", True):
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def _upgrade(session: Session, _now: float) -> None:
    connection = session.connection()
    lock_schema(connection)
    schema.upgrade(connection)


def lock_schema(connection: Connection) -> None:
    """Make other servers wait with their upgrades until the transaction ends; SQLite has one writer at a time."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": SETUP_LOCK})
        connection.execute(text("SET LOCAL statement_timeout = 0"))  # a large table takes its time


def lock_tenant(session: Session, tenant: str) -> None:
    """Make other transactions of the tenant that call this wait until this one ends; SQLite has one writer at a time."""
    if session.get_bind().dialect.name == "postgresql":
        lock = text("SELECT pg_advisory_xact_lock(:lock, hashtext(:tenant))")
        session.execute(lock, {"lock": TENANT_LOCK, "tenant": tenant})
