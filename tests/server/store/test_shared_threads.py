"""No client has all threads of the database, however many transactions it begins, and whenever it leaves."""

from __future__ import annotations

import asyncio
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from server.errors import DatabaseUnavailable
from server.limits.turns import client_in_turn
from server.store import database as module
from server.store.database import Database

pytestmark = pytest.mark.anyio


def count(session: Session, now: float) -> int:
    return session.scalar(text("SELECT 0")) or 0


async def read_slowly(database: Database, client: str, released: threading.Event) -> None:
    client_in_turn.set(client)
    await database.read(lambda session, now: released.wait(60))


async def test_a_client_with_many_slow_reads_leaves_threads_to_others(sqlite: Database) -> None:
    released = threading.Event()
    slow = [asyncio.create_task(read_slowly(sqlite, "a", released)) for _ in range(40)]
    await asyncio.sleep(0.1)  # as many as may run do
    try:
        assert await asyncio.wait_for(sqlite.read(count), 10) == 0
    finally:
        released.set()
        await asyncio.gather(*slow)


async def test_a_client_that_leaves_again_and_again_leaves_threads_to_others(sqlite: Database) -> None:
    released = threading.Event()
    try:
        for _ in range(20):
            leaving = asyncio.create_task(read_slowly(sqlite, "a", released))
            await asyncio.sleep(0.01)  # it has begun, if it may
            leaving.cancel()
        assert await asyncio.wait_for(sqlite.read(count), 10) == 0
    finally:
        released.set()
    await asyncio.wait_for(read_slowly(sqlite, "a", released), 10)


async def test_the_waiting_transactions_of_a_client_have_a_limit(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_OF_CLIENT", 2)
    released = threading.Event()
    slow = [asyncio.create_task(read_slowly(sqlite, "a", released)) for _ in range(module.NUM_THREADS_OF_CLIENT + 2)]
    await asyncio.sleep(0.1)
    try:
        with pytest.raises(DatabaseUnavailable, match="too many transactions"):
            await asyncio.create_task(read_slowly(sqlite, "a", released))
        assert await asyncio.wait_for(sqlite.read(count), 10) == 0
    finally:
        released.set()
        await asyncio.gather(*slow)


async def test_transactions_of_other_clients_refuse_none_of_a_client_that_has_none(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TRANSACTIONS", 6)
    released = threading.Event()
    slow = [asyncio.create_task(read_slowly(sqlite, client, released)) for client in ("a", "b") for _ in range(3)]
    await asyncio.sleep(0.1)
    try:
        assert await asyncio.wait_for(sqlite.read(count), 10) == 0
        with pytest.raises(DatabaseUnavailable, match="too many transactions"):
            await asyncio.create_task(read_slowly(sqlite, "a", released))
    finally:
        released.set()
        await asyncio.gather(*slow)
