"""A spare worker process, which is taken, dies, is stopped, and ends with the API process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from server.engine_client import spare as spare_module
from server.engine_client.client import WorkerClient
from server.engine_client.spare import Spare
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.wire import WORKER_MODULE
from tests.server.engine_client.requests import FakeDecoder, read_tokens, stream
from tests.server.fakes import TOKENIZER, eventually

pytestmark = pytest.mark.anyio

FACTORY = "tests.server.engine_client.slow_import:build"


@pytest.fixture
async def engine(
    decoder: FakeDecoder, metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[WorkerClient]:
    """Yield a client of a ready worker, whose spare has imported the engine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SLOW_IMPORTS", str(tmp_path))
    monkeypatch.setattr(spare_module, "FIRST_PAUSE", 0.05)
    client = WorkerClient(Settings(), decoder, metrics, Spare(FACTORY, 30.0))
    await client.start()
    await asyncio.wait_for(client.loaded(), 20)
    await eventually(lambda: has_imported(tmp_path, spares(client, tmp_path)))
    yield client
    await client.stop()


def workers(folder: Path) -> set[int]:
    """Return the processes that are workers of this test, with or without `Start`; other tests' servers have some, too."""
    return {child.pid for child in psutil.Process().children() if _is_worker(child, folder)}


def _is_worker(process: psutil.Process, folder: Path) -> bool:
    try:
        return WORKER_MODULE in process.cmdline() and process.environ().get("SLOW_IMPORTS") == str(folder)
    except psutil.Error:  # it ended meanwhile
        return False


def spares(client: WorkerClient, folder: Path) -> set[int]:
    return workers(folder) - {client.info["pid"]}


def has_imported(folder: Path, pids: set[int]) -> bool:
    return bool(pids) and all((folder / f"imported-{pid}").exists() for pid in pids)


async def test_a_prepared_process_is_the_first_worker(
    decoder: FakeDecoder, metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_IMPORTS", str(tmp_path))
    spare = Spare(FACTORY, max_pause=1.0, variables={"OMP_PROC_BIND": "true"})
    spare.prepare()
    await eventually(lambda: has_imported(tmp_path, workers(tmp_path)))
    (first,) = workers(tmp_path)
    assert psutil.Process(first).environ()["OMP_PROC_BIND"] == "true"
    client = WorkerClient(Settings(), decoder, metrics, spare)
    await client.start()
    await asyncio.wait_for(client.loaded(), 20)
    assert client.info["pid"] == first
    await client.stop()


async def test_a_spare_takes_the_place_of_a_dead_worker_and_another_is_kept(
    engine: WorkerClient, tmp_path: Path
) -> None:
    (spare,) = spares(engine, tmp_path)
    os.kill(engine.info["pid"], signal.SIGKILL)
    await eventually(lambda: engine.state == "ready" and engine.info["pid"] == spare)
    assert await read_tokens(stream(engine, "after"), 3) == TOKENIZER.encode_plain("abc")
    await eventually(lambda: has_imported(tmp_path, spares(engine, tmp_path)))
    assert spare not in spares(engine, tmp_path)


async def test_a_spare_that_dies_is_replaced(engine: WorkerClient, tmp_path: Path) -> None:
    (spare,), worker = spares(engine, tmp_path), engine.info["pid"]
    os.kill(spare, signal.SIGKILL)
    await eventually(lambda: spare not in workers(tmp_path) and has_imported(tmp_path, spares(engine, tmp_path)))
    assert (engine.state, engine.info["pid"]) == ("ready", worker)


async def test_a_restart_next_to_a_dead_spare_starts_a_new_worker(engine: WorkerClient, tmp_path: Path) -> None:
    (spare,), worker = spares(engine, tmp_path), engine.info["pid"]
    for pid in (spare, worker):
        os.kill(pid, signal.SIGKILL)
    await eventually(lambda: engine.state == "ready" and engine.info["pid"] not in (spare, worker))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells that a process is stopped")
async def test_a_stopped_spare_is_not_taken(engine: WorkerClient, tmp_path: Path) -> None:
    (spare,), worker = spares(engine, tmp_path), engine.info["pid"]
    os.kill(spare, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    await eventually(lambda: engine.state == "ready" and engine.info["pid"] not in (spare, worker))
    assert spare not in workers(tmp_path)


async def test_a_worker_that_dies_before_its_spare_has_imported_is_replaced(
    engine: WorkerClient, tmp_path: Path
) -> None:
    first = engine.info["pid"]
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: engine.state == "ready" and engine.info["pid"] != first and bool(spares(engine, tmp_path)))
    second = engine.info["pid"]
    os.kill(second, signal.SIGKILL)
    await eventually(lambda: engine.state == "ready" and engine.info["pid"] not in (first, second))
    assert await read_tokens(stream(engine, "after"), 3) == TOKENIZER.encode_plain("abc")


async def test_no_spare_is_kept_after_the_client_has_stopped(engine: WorkerClient, tmp_path: Path) -> None:
    assert len(workers(tmp_path)) == 2
    await engine.stop()
    assert not workers(tmp_path)
    assert not list(tmp_path.glob("flamboyance-*"))


async def test_a_spare_is_not_kept_if_it_is_switched_off(
    decoder: FakeDecoder, metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_IMPORTS", str(tmp_path))
    client = WorkerClient(
        Settings(spare_worker=False), decoder, metrics, Spare("tests.server.scripted_engine:build", 30.0)
    )
    await client.start()
    await asyncio.wait_for(client.loaded(), 20)
    await asyncio.sleep(0.5)
    assert workers(tmp_path) == {client.info["pid"]}
    await client.stop()
