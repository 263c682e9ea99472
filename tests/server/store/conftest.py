"""A clock that tests set, and examples with media for support sets."""

from __future__ import annotations

import time
from typing import Any

import pytest

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
def embeddings(database: Database) -> EmbeddingStore:
    return EmbeddingStore(database)
