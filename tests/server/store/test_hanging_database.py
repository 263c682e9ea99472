"""A PostgreSQL that hangs with open connections: transactions fail in time, and nothing keeps the process from ending."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from server.errors import DatabaseUnavailable
from server.store import database as module
from server.store.database import Database
from server.store.threads import Threads

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[3]

PROCESS = """
import asyncio, sys
from sqlalchemy import text
from server.errors import DatabaseUnavailable
from server.store import database as module

module.TRANSACTION_SECONDS = module.CLOSING_SECONDS = 0.2


async def run():
    database = module.Database(sys.argv[1])
    try:
        await database.read(lambda session, now: session.execute(text("SELECT pg_sleep(50)")))
    except DatabaseUnavailable as error:
        print(error.message)
    database.close()


asyncio.run(run())
"""


def hang(session: Session, now: float) -> None:
    session.execute(text("SELECT pg_sleep(1.5)"))


@pytest.fixture
async def database(postgresql_url: str) -> AsyncIterator[Database]:
    database = Database(postgresql_url)
    await database.prepare()
    yield database
    database.close()


async def test_a_transaction_has_a_time_limit(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRANSACTION_SECONDS", 0.1)
    begin = time.monotonic()
    for transaction in (database.read(hang), database.write(hang)):
        with pytest.raises(DatabaseUnavailable, match="does not respond"):
            await transaction
    assert time.monotonic() - begin < 1
    assert await database.read(lambda session, now: session.scalar(text("SELECT 1"))) == 1


async def test_a_write_whose_caller_is_cancelled_fails_silently(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "TRANSACTION_SECONDS", 0.1)
    writing = asyncio.create_task(database.write(hang))
    await asyncio.sleep(0.05)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    del writing
    gc.collect()
    assert [record.name for record in caplog.records] == [module.__name__]


async def test_transactions_end_soon_when_the_server_ends(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSING_SECONDS", 0.1)
    running = asyncio.create_task(database.write(hang))
    await asyncio.sleep(0.05)
    begin = time.monotonic()
    database.end_soon()
    with pytest.raises(DatabaseUnavailable, match="does not respond"):
        await running
    with pytest.raises(DatabaseUnavailable, match="does not respond"):
        await database.read(hang)
    assert time.monotonic() - begin < 1


def test_the_process_ends(postgresql_url: str) -> None:
    command = [sys.executable, "-c", PROCESS, postgresql_url]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (0, "the database does not respond\n"), ended.stderr


def test_calls_that_wait_are_cancelled_and_those_that_run_end() -> None:
    threads, has_begun, may_end = Threads(1, "test"), threading.Event(), threading.Event()

    def run() -> bool:
        has_begun.set()
        return may_end.wait(20)

    running = threads.submit(run)
    waiting = threads.submit(int)
    assert has_begun.wait(20)
    threading.Timer(0.1, may_end.set).start()
    threads.close(20)
    assert running.result(0) is True
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="after shutdown"):
        threads.submit(int)


def test_a_call_is_refused_or_run_once_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threads, calls = Threads(16, "test"), list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            threads.submit(calls.append, "refused")
    threads.submit(calls.append, "first").result(20)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        threads.submit(calls.append, "in the same thread").result(20)
    assert calls == ["first", "in the same thread"]
    threads.close(20)
