"""Writers killed with SIGKILL at random moments: what was acknowledged is there, and nothing is there by half."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
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
from server.store.database import Database
from server.store.support_sets import SupportSets
from tests.server.store.killable_writers import SHARED

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[3]
# as many as there is time for: a slow machine makes fewer
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 4, 40, 8.0
MAX_LIFE = 0.3


class Writers:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        # acknowledgements that came before a start's answer
        self._ahead: deque[dict[str, Any]] = deque()

    def start(self, order: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        while "started" not in (line := self._line()):
            self._ahead.append(line)
        pid: int = line["started"]
        return pid

    def read(self) -> dict[str, Any]:
        return self._ahead.popleft() if self._ahead else self._line()

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


async def held(support_sets: SupportSets, name: str, version: int) -> list[Any]:
    found = await support_sets.get_version(name, version)
    return sorted([e.id, e.text, list(e.media)] for e in found.examples)


async def check_whole(support_sets: SupportSets, store: MediaStore) -> int:
    """Every version of every set holds what its record says, and its media have the bytes of their ids."""
    num_versions = 0
    for info in await support_sets.page("", 1000):
        history = await support_sets.versions(info.id, 0, 10_000)
        assert [made.version for made in history] == list(range(1, info.version + 1))
        for made in history:
            found = await support_sets.get_version(info.id, made.version)
            assert len(found.examples) == made.num_examples
            for media_id in found.media:
                store.get(media_id)  # raises for bytes of another digest
            num_versions += 1
    return num_versions


async def test_killed_writers_lose_nothing_that_was_acknowledged(
    run: Writers, support_sets: SupportSets, store: MediaStore
) -> None:
    acknowledged: list[dict[str, Any]] = []
    end, rounds = time.monotonic() + SECONDS, 0
    while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.monotonic() < end):
        acknowledged += killed(run, rounds)
        rounds += 1
    assert len(acknowledged) > rounds
    for line in acknowledged:
        assert await held(support_sets, line["set"], line["version"]) == line["examples"]
    assert await check_whole(support_sets, store) >= len(acknowledged)
    # what a killed writer has left, leases included, holds nobody up
    await support_sets.sweep()
    for seed in range(rounds):
        await support_sets.delete(f"s{seed}")


def killed(run: Writers, seed: int) -> list[dict[str, Any]]:
    """What one writer was acknowledged before it was killed."""
    pid = run.start(f"alone {seed}")
    # counted from the first one, so that a slow machine's writer is not killed before
    lines = [run.read()]
    time.sleep(random.Random(seed).uniform(0, MAX_LIFE))
    os.kill(pid, signal.SIGKILL)
    while "ended" not in (line := run.read()):
        lines.append(line)
    return lines


async def test_processes_side_by_side_make_versions_without_gap(
    run: Writers, support_sets: SupportSets, store: MediaStore
) -> None:
    await support_sets.create(SHARED, [])
    count, num_writers = 5, 3
    for seed in range(num_writers):
        await asyncio.to_thread(run.start, f"shared {seed} {count}")
    lines = [await asyncio.to_thread(run.read) for _ in range(count * num_writers)]
    assert sorted(line["version"] for line in lines) == list(range(2, count * num_writers + 2))
    for line in lines:
        assert line["example"] in await held(support_sets, SHARED, line["version"])
    assert len(await held(support_sets, SHARED, count * num_writers + 1)) == count * num_writers
    await check_whole(support_sets, store)


def test_a_fresh_database_is_made_once_by_all_who_start_at_once(database_url: str) -> None:
    async def prepare() -> None:
        databases = [Database(database_url) for _ in range(6)]
        await asyncio.gather(*(database.prepare() for database in databases))
        for database in databases:
            database.close()

    asyncio.run(prepare())
