"""Classifies the errors of SQLite and of PostgreSQL's driver."""

from __future__ import annotations

import logging

from sqlalchemy import exc

from server.errors import DatabaseUnavailable
from server.store.database_file import DAMAGED

# PostgreSQL's serialization_failure, deadlock_detected, foreign_key_violation and unique_violation: another transaction
# committed first; a retry sees its result, and then succeeds or is finally refused
RETRIED_STATES = {"40001", "40P01", "23503", "23505"}
# messages of SQLite and PostgreSQL for damaged files; tables exist from the first transaction on
DAMAGE = (
    *("disk image is malformed", "malformed database schema", "is not a database", "no such table"),
    *("invalid page in block", "could not read block"),
)
# PostgreSQL's undefined_table, data_corrupted and index_corrupted, whose messages may be in any language
DAMAGE_STATES = {"42P01", "XX001", "XX002"}
# messages of SQLite and PostgreSQL for a full disk
FULL_DISK = ("disk is full", "No space left", "could not extend")
# SQLite's name of the error if the file for the index of its log cannot grow; the message is that of a broken disk
INDEX_CANNOT_GROW = "SQLITE_IOERR_SHMSIZE"
# messages of PostgreSQL for too_many_connections, of all clients, of a role or of a database: its driver gives an error of
# connecting no state
FULL = ("too many clients", "too many connections", "connection slots")
# its messages for a connection that it refuses
UNKNOWN = ("authentication failed", '" does not exist')
NOT_PERMITTED = "no pg_hba.conf entry"
# PostgreSQL's read_only_sql_transaction, for which its driver has no class of errors
READ_ONLY_STATE = "25006"
LOCKED = "the database is locked by another transaction"

logger = logging.getLogger(__name__)


def is_contention(error: exc.DBAPIError) -> bool:
    """Return whether another transaction was the cause, so that a retry may succeed."""
    return _state(error) in RETRIED_STATES or "FOREIGN KEY" in str(error.orig) or "UNIQUE constraint" in str(error.orig)


def refusal(error: exc.DBAPIError) -> Exception:
    """Return what to raise for an error: `DatabaseUnavailable` if the database is the cause, which is logged."""
    message = str(error.orig)
    is_failure = isinstance(error, exc.OperationalError | exc.InterfaceError) or error.connection_invalidated
    if is_failure or is_damage(error) or is_read_only(error.orig):
        reason = _reason(error)
        logger.error(reason, extra={"error": message.strip()})
        return DatabaseUnavailable(reason)
    return error


def is_damage(error: exc.DBAPIError) -> bool:
    return _state(error) in DAMAGE_STATES or any(part in str(error.orig) for part in DAMAGE)


def is_read_only(error: BaseException | None) -> bool:
    """Return whether PostgreSQL has refused a write because it, or the connection, only reads."""
    return getattr(error, "sqlstate", None) == READ_ONLY_STATE


def _state(error: exc.DBAPIError) -> str | None:
    """Return PostgreSQL's code of an error."""
    return getattr(error.orig, "sqlstate", None)


def _reason(error: exc.DBAPIError) -> str:
    """Return a message for a driver's error, without its text."""
    message = str(error.orig)
    if is_damage(error):
        return DAMAGED
    if any(part in message for part in FULL_DISK) or getattr(error.orig, "sqlite_errorname", "") == INDEX_CANNOT_GROW:
        return "the database cannot be written: its disk is full"
    if is_read_only(error.orig) or "readonly" in message or "read-only" in message:
        return "the database cannot be written: it is read-only"
    if "locked" in message or "lock timeout" in message:
        return LOCKED
    if "unable to open database file" in message:
        return "the database file cannot be opened: this user must be able to read it and to write in its folder"
    if "disk I/O error" in message:
        return "the database cannot be read or written: its disk fails"
    if any(part in message for part in UNKNOWN):
        return "the database server does not know this database, or this user, or does not accept the password"
    if NOT_PERMITTED in message:
        return "the database server does not permit this user, database or address, or not without TLS"
    if any(part in message for part in FULL):
        return "the database accepts no further connection: its clients have as many as its limit permits"
    return "the database does not respond"
