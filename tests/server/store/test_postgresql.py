"""PostgreSQL alone: connections that only read, permissions and encodings."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import psycopg
import pytest
from sqlalchemy import insert, text
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from server.errors import DatabaseUnavailable
from server.limits.turns import client_in_turn
from server.serving import open_database
from server.store.database import NUM_THREADS, Database
from server.store.records import EmbeddingRow
from server.store.schema import DatabaseError

pytestmark = pytest.mark.anyio


def put(session: Session, now: float) -> None:
    session.execute(insert(EmbeddingRow).values(key="a", model="m", vector=b"", created_at=0.0))


async def test_a_connection_that_only_reads_is_unavailable_and_replaced(another_schema: str) -> None:
    database = Database(another_schema)

    def restrict(session: Session, now: float) -> None:
        """Leave a connection in the pool like one that was made while the database was read-only."""
        session.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))

    await database.write(restrict)
    with pytest.raises(DatabaseUnavailable, match=r"^the database cannot be written: it is read-only$"):
        await database.write(put)
    await database.write(put)
    database.close()


async def test_a_user_who_may_not_create_tables_is_refused_in_one_line(another_schema: str) -> None:
    with psycopg.connect(another_schema, autocommit=True) as connection:
        connection.execute("CREATE ROLE visitor LOGIN")
    try:
        with pytest.raises(DatabaseError, match=r"^database: no schema has been selected to create in$"):
            await open_database(Database(another_schema.replace("flamboyance@", "visitor@")))
    finally:
        with psycopg.connect(another_schema, autocommit=True) as connection:
            connection.execute("DROP ROLE visitor")


async def test_a_server_without_a_free_connection_is_unavailable_by_its_own_words(another_schema: str) -> None:
    with psycopg.connect(another_schema, autocommit=True) as connection:
        connection.execute("CREATE ROLE visitor LOGIN CONNECTION LIMIT 0")
    database = Database(another_schema.replace("flamboyance@", "visitor@"))
    try:
        with pytest.raises(DatabaseUnavailable, match=r"^the database accepts no further connection: .* limit"):
            await database.read(lambda session, now: None)
    finally:
        database.close()
        with psycopg.connect(another_schema, autocommit=True) as connection:
            connection.execute("DROP ROLE visitor")


@pytest.mark.parametrize("url", ["stranger@", "flamboyance@"])
async def test_an_unknown_database_or_user_is_no_server_that_does_not_respond(url: str, postgresql_url: str) -> None:
    address = make_url(postgresql_url.replace("flamboyance@", url))
    database = Database(address.set(database="nodb" if url == "flamboyance@" else address.database).render_as_string())
    try:
        with pytest.raises(
            DatabaseUnavailable, match=r"^the database server does not know this database, or this user"
        ):
            await database.read(lambda session, now: None)
    finally:
        database.close()


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_that_cannot_store_every_text_is_refused(encoding: str, postgresql_url: str) -> None:
    name = encoding.lower()
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        connection.execute(
            f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        )
    try:
        with pytest.raises(
            DatabaseError, match=rf"^database: its encoding is {encoding}; create one with ENCODING 'UTF8'"
        ):
            await open_database(Database(postgresql_url.replace("/postgres?", f"/{name}?")))
    finally:
        with psycopg.connect(postgresql_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name}")


async def test_a_client_has_half_of_the_threads(another_schema: str) -> None:
    database, released = Database(another_schema), threading.Event()
    await database.prepare()

    async def read(client: str, transaction: Callable[[Session, float], object]) -> None:
        client_in_turn.set(client)
        await database.read(transaction)

    waiting = [asyncio.create_task(read("a", lambda session, now: released.wait(60))) for _ in range(NUM_THREADS + 1)]
    await asyncio.sleep(0.1)  # as many as may run do
    try:
        await asyncio.wait_for(asyncio.create_task(read("b", lambda session, now: None)), 10)
    finally:
        released.set()
        await asyncio.gather(*waiting)
    database.close()
