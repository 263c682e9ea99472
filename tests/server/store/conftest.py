"""A clock that tests set, examples with media for support sets, and a database of an older server."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.engine import make_url

from server.fewshot.retrieval import EmbeddingStore
from server.media.source import EncodedMedia, encoded
from server.store import database as database_module
from server.store.database import Database
from server.store.records import NewExample

RED, GREEN, BLUE = (encoded(data, "image", "") for data in (b"red", b"green", b"blue"))


def example(example_id: str, *media: EncodedMedia, **fields: Any) -> NewExample:
    return NewExample(id=example_id, media=media, **{"text": f"text of {example_id}", **fields})


class Clock:
    """The time that the database passes to transactions."""

    sleep = staticmethod(time.sleep)
    monotonic = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(database_module, "time", clock)
    return clock


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'folder' / 'data.db'}")
    await database.prepare()
    yield database
    database.close()


@pytest.fixture
def embeddings(database: Database) -> EmbeddingStore:
    return EmbeddingStore(database)


# dumps of the databases of a server from before the migrations
DATABASES = Path(__file__).with_name("databases")


@pytest.fixture
def old_database(database_url: str) -> Iterator[Database]:
    """A database of version 1: two support sets, an upload, an evaluation, vectors, a fit and a stored answer."""
    name = "postgresql" if database_url.startswith("postgresql") else "sqlite"
    dump = (DATABASES / f"version_1.{name}.sql").read_text()
    if name == "postgresql":
        with psycopg.connect(database_url) as connection:
            connection.execute(dump.encode())
    else:
        file = Path(str(make_url(database_url).database))
        file.parent.mkdir(parents=True)
        sqlite = sqlite3.connect(file)
        sqlite.executescript(dump)
        sqlite.close()
    database = Database(database_url)
    yield database
    database.close()
