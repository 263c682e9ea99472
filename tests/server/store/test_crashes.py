"""Writers that are killed with SIGKILL at random: acknowledged versions are there, and no version is incomplete."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.media.store import MediaStore
from server.store import database as database_module
from server.store.database import Database
from server.store.media_references import LEASE_SECONDS
from server.store.support_sets import SupportSets
from tests.server.store.conftest import Clock
from tests.server.store.killable_writers import SHARED
from tests.server.store.test_support_sets import num_unpublished

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[3]
# rounds within SECONDS: fewer on a slow machine
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 4, 40, 8.0
MAX_DELAY = 0.3


class Writers:
    """The process that forks writers: its acknowledgements, in order."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        # acknowledgements that arrived before the reply to a start
        self._pending: deque[dict[str, Any]] = deque()

    def start(self, command: str) -> int:
        """Start a writer and return its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        while "started" not in (line := self._line()):
            self._pending.append(line)
        pid: int = line["started"]
        return pid

    def read(self) -> dict[str, Any]:
        return self._pending.popleft() if self._pending else self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line: dict[str, Any] = json.loads(self._process.stdout.readline())
        return line


@contextmanager
def writers(database_url: str, store: Path) -> Iterator[Writers]:
    command = [sys.executable, "-m", "tests.server.store.killable_writers", database_url, str(store)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
    ) as process:
        yield Writers(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def run(database_url: str, tmp_path: Path) -> Iterator[Writers]:
    with writers(database_url, tmp_path / "media") as started:
        yield started


async def stored_examples(support_sets: SupportSets, name: str, version: int) -> list[Any]:
    support_set = await support_sets.get_version(name, version)
    return sorted([e.id, e.text, list(e.media)] for e in support_set.examples)


async def check_complete(support_sets: SupportSets, store: MediaStore) -> int:
    """Check that every version has the recorded number of examples, and its media the bytes of their ids.

    Return the number of versions.
    """
    num_versions = 0
    for info in await support_sets.page("", 1000):
        history = await support_sets.versions(info.id, 0, 10_000)
        assert [version.version for version in history] == list(range(1, info.version + 1))
        for version in history:
            support_set = await support_sets.get_version(info.id, version.version)
            assert len(support_set.examples) == version.num_examples
            for media_id in support_set.media:
                store.get(media_id)  # raises for bytes of another digest
            num_versions += 1
    return num_versions


class Later(Clock):
    """A clock that is ahead by more than anything of a request is held."""

    def __init__(self) -> None:
        self.now = time.time() + 2 * LEASE_SECONDS


async def test_killed_writers_lose_no_acknowledged_version(
    run: Writers,
    support_sets: SupportSets,
    database: Database,
    store: MediaStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    acknowledged: list[dict[str, Any]] = []
    end, rounds = time.monotonic() + SECONDS, 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.monotonic() < end):
        acknowledged += kill_writer(run, rounds)
        rounds += 1
    for line in acknowledged:
        assert await stored_examples(support_sets, line["set"], line["version"]) == line["examples"]
    assert await check_complete(support_sets, store) >= len(acknowledged)
    # nothing that a killed writer left behind, leases included, blocks other writers; it expires
    await support_sets.sweep()
    with monkeypatch.context() as later:
        later.setattr(database_module, "time", Later())
        await support_sets.sweep()
    assert await database.read(num_unpublished) == 0
    for seed in range(rounds):
        await support_sets.delete(f"s{seed}")


def kill_writer(run: Writers, seed: int) -> list[dict[str, Any]]:
    """Run a writer and kill it a moment after its first, second or third acknowledgement. Returns all of them."""
    pid = run.start(f"alone {seed}")
    # acknowledgements are counted, not awaited for a time: a slow machine has few of them in any delay
    lines = [run.read() for _ in range(1 + seed % 3)]
    assert all("version" in line for line in lines), "the writer failed"
    time.sleep(random.Random(seed).uniform(0, MAX_DELAY))
    os.kill(pid, signal.SIGKILL)
    while "ended" not in (line := run.read()):
        lines.append(line)
    return lines


async def test_concurrent_processes_create_versions_without_gaps(
    run: Writers, support_sets: SupportSets, store: MediaStore
) -> None:
    await support_sets.create(SHARED, [])
    count, num_writers = 5, 3
    for seed in range(num_writers):
        await asyncio.to_thread(run.start, f"shared {seed} {count}")
    lines = [await asyncio.to_thread(run.read) for _ in range(count * num_writers)]
    assert sorted(line["version"] for line in lines) == list(range(2, count * num_writers + 2))
    for line in lines:
        assert line["example"] in await stored_examples(support_sets, SHARED, line["version"])
    assert len(await stored_examples(support_sets, SHARED, count * num_writers + 1)) == count * num_writers
    await check_complete(support_sets, store)


def test_a_new_database_is_prepared_once_by_concurrent_servers(database_url: str) -> None:
    async def prepare() -> None:
        databases = [Database(database_url) for _ in range(6)]
        await asyncio.gather(*(database.prepare() for database in databases))
        for database in databases:
            database.close()

    asyncio.run(prepare())


async def test_a_new_database_is_prepared_after_the_transaction_of_another_server(tmp_path: Path) -> None:
    file = tmp_path / "test.db"
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    database = Database(f"sqlite:///{file}")
    preparing = asyncio.create_task(database.prepare())
    await asyncio.wait({preparing}, timeout=0.2)
    other.execute("COMMIT")
    await preparing
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
    database.close()
