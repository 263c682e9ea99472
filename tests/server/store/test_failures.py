"""Errors of the databases' drivers are named by their causes."""

from __future__ import annotations

import sqlite3

import pytest
from sqlalchemy.exc import OperationalError

from server.store.failures import refusal


@pytest.mark.parametrize(
    ("name", "reason"), [("SQLITE_IOERR_SHMSIZE", "its disk is full"), ("SQLITE_IOERR_READ", "its disk fails")]
)
def test_a_disk_that_is_full_when_the_file_is_opened_is_not_called_broken(name: str, reason: str) -> None:
    """SQLite has the same message for both."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = name
    assert reason in str(refusal(OperationalError("PRAGMA journal_mode = WAL", {}, error)))
