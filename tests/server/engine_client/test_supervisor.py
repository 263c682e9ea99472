"""Real worker processes that die, hang, fail to start and are restarted."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.engine_client import supervisor as supervisor_module
from server.engine_client.client import WorkerClient
from server.engine_client.spare import Spare
from server.errors import EngineDied, EngineNotReady, EngineStalled
from server.settings import Settings, SettingsError
from server.telemetry.metrics import Metrics
from tests.server.engine_client.requests import FakeDecoder, image, read_tokens, score, stream
from tests.server.fakes import TOKENIZER, eventually
from tests.server.scripted_engine import EXIT, RAISE, SLEEP

pytestmark = pytest.mark.anyio


async def test_a_killed_worker_fails_its_requests_and_is_restarted(engine: WorkerClient, metrics: Metrics) -> None:
    pid = engine.info["pid"]
    running = [asyncio.create_task(read_tokens(stream(engine, str(i)), 10**6)) for i in range(3)]
    await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    for result in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(result, EngineDied)
    assert engine.state == "restarting"
    with pytest.raises(EngineNotReady):
        await read_tokens(stream(engine, "refused"), 1)
    await eventually(lambda: engine.state == "ready")
    assert engine.info["pid"] != pid
    assert await read_tokens(stream(engine, "after"), 3) == TOKENIZER.encode_plain("abc")
    assert 'flamboyance:engine_restarts_total{model_name="tiny"} 1.0' in metrics.expose().decode()


async def test_a_step_that_raises_ends_the_worker(engine: WorkerClient) -> None:
    with pytest.raises(EngineDied):
        await read_tokens(stream(engine, "1", script=RAISE), 1)
    await eventually(lambda: engine.state == "ready")


async def test_a_killed_worker_fails_a_score(engine: WorkerClient, decoder: FakeDecoder) -> None:
    decoder.opened.clear()
    a = image("a")
    waiting = asyncio.create_task(engine.score(score("1", a), {a.digest: a}))
    await eventually(lambda: decoder.decoded == [b"a"])
    os.kill(engine.info["pid"], signal.SIGKILL)
    with pytest.raises(EngineDied):
        await waiting
    with pytest.raises(EngineNotReady):
        await engine.embed_text([[1]])
    engine.pin([a.digest], True)  # without a worker, a hint is ignored


async def test_the_step_age_of_a_hanging_worker_grows(engine: WorkerClient) -> None:
    assert engine.step_age == 0.0
    hanging = asyncio.create_task(read_tokens(stream(engine, "1", script=SLEEP), 1))
    await eventually(lambda: engine.step_age > 1.0)
    hanging.cancel()
    os.kill(engine.info["pid"], signal.SIGKILL)
    await eventually(lambda: engine.state == "restarting")


async def test_the_step_age_of_an_idle_worker_is_zero(engine: WorkerClient) -> None:
    await asyncio.sleep(1.2)
    assert engine.step_age == 0.0


@pytest.fixture
async def impatient(decoder: FakeDecoder, metrics: Metrics) -> AsyncIterator[WorkerClient]:
    """Yield a client that takes a worker for hanging after 1.5 seconds."""
    settings = Settings(stall_timeout=1.5)
    client = WorkerClient(
        settings, decoder, metrics, Spare("tests.server.scripted_engine:build", settings.max_restart_delay)
    )
    await client.start()
    await asyncio.wait_for(client.loaded(), 20)
    yield client
    await client.stop()


async def test_a_stopped_worker_is_replaced_and_its_requests_fail(impatient: WorkerClient) -> None:
    pid = impatient.info["pid"]
    running = asyncio.create_task(read_tokens(stream(impatient, "running"), 10**6))
    await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGSTOP)
    waiting = asyncio.create_task(impatient.score(score("waiting"), {}))
    for result in await asyncio.wait_for(asyncio.gather(running, waiting, return_exceptions=True), 20):
        assert isinstance(result, EngineStalled)
    assert impatient.state == "restarting"
    await eventually(lambda: impatient.state == "ready")
    assert impatient.info["pid"] != pid
    assert await read_tokens(stream(impatient, "after"), 3) == TOKENIZER.encode_plain("abc")


async def test_a_worker_competes_with_the_decode_processes(engine: WorkerClient) -> None:
    """Their lower priority counts only within a session. A Ctrl-C is not for the worker: its process group is its own."""
    pid = engine.info["pid"]
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0)
    assert (os.getsid(pid), os.getpgid(pid)) == (os.getsid(0), pid)


async def test_a_worker_that_waits_for_media_does_not_hang(impatient: WorkerClient, decoder: FakeDecoder) -> None:
    pid = impatient.info["pid"]
    decoder.opened.clear()
    a = image("a")
    waiting = asyncio.create_task(read_tokens(stream(impatient, "1", a), 3))
    await asyncio.sleep(2.0)
    decoder.opened.set()
    assert await waiting == TOKENIZER.encode_plain("abc")
    assert (impatient.info["pid"], impatient.state) == (pid, "ready")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells that a process is exiting")
async def test_a_worker_that_has_begun_to_exit_is_not_ready(engine: WorkerClient) -> None:
    dying = asyncio.create_task(read_tokens(stream(engine, "1", script=EXIT), 1))
    await eventually(lambda: engine.state == "restarting")
    assert not dying.done()
    with pytest.raises(EngineNotReady):
        await read_tokens(stream(engine, "refused"), 1)
    os.kill(engine.info["pid"], signal.SIGKILL)
    with pytest.raises(EngineDied):
        await dying


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells that a process is exiting")
async def test_a_killed_worker_is_not_ready_before_its_end_is_noticed(engine: WorkerClient) -> None:
    assert engine.state == "ready"
    os.kill(engine.info["pid"], signal.SIGKILL)
    deadline = time.monotonic() + 5
    while engine.state == "ready":  # the loop does not run, so nothing else can notice
        assert time.monotonic() < deadline


async def test_failed_restarts_are_reported_and_tried_again(
    decoder: FakeDecoder, metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_DELAY", 0.02)
    delays = recorded_delays(monkeypatch)
    weights = tmp_path / "weights"
    weights.touch()
    factory = "tests.server.scripted_engine:build_if_model_exists"
    client = WorkerClient(Settings(model=str(weights), max_restart_delay=0.05), decoder, metrics, Spare(factory, 0.05))
    await client.start()
    await asyncio.wait_for(client.loaded(), 20)
    weights.unlink()
    os.kill(client.info["pid"], signal.SIGKILL)
    await eventually(lambda: client.state == "failed")
    assert delays[:4] == [0.0, 0.02, 0.04, 0.05]
    weights.touch()
    await eventually(lambda: client.state == "ready")
    assert await read_tokens(stream(client, "after"), 3) == TOKENIZER.encode_plain("abc")
    await client.stop()


async def test_a_worker_that_cannot_be_spawned_is_tried_again(
    engine: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn, errors = asyncio.create_subprocess_exec, [BlockingIOError("no more processes")]

    async def spawn_later(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return await spawn(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn_later)
    os.kill(engine.info["pid"], signal.SIGKILL)
    await eventually(lambda: not errors)
    await eventually(lambda: engine.state == "ready")


def recorded_delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of the delays that the supervisor logs before it starts another worker."""
    delays: list[float] = []
    monkeypatch.setattr(
        supervisor_module.logger, "warning", lambda _message, *, extra: delays.append(extra["delay_seconds"])
    )
    return delays


async def test_only_this_user_may_open_the_socket(engine: WorkerClient, tmp_path: Path) -> None:
    folders = list(tmp_path.glob("flamboyance-*"))
    assert folders
    for folder in folders:
        (socket,) = folder.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600


async def test_a_worker_that_cannot_start_is_not_restarted(decoder: FakeDecoder, metrics: Metrics) -> None:
    client = WorkerClient(Settings(), decoder, metrics, Spare("tests.server.scripted_engine:build_fails", 30.0))
    await client.start()
    with pytest.raises(EngineDied, match="could not be started"):
        await asyncio.wait_for(client.loaded(), 20)
    assert client.state == "failed"
    await client.stop()


async def test_settings_that_a_worker_refuses_are_named(
    decoder: FakeDecoder, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    client = WorkerClient(Settings(), decoder, metrics, Spare("tests.server.scripted_engine:build_refuses", 30.0))
    await client.start()
    with pytest.raises(SettingsError, match=r"^device: there is none$"):
        await asyncio.wait_for(client.loaded(), 20)
    assert client.state == "failed"
    await client.stop()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_objects_from_before_the_first_request_are_not_collected(engine: WorkerClient, metrics: Metrics) -> None:
    await eventually(lambda: metrics.engine.values.get("num_frozen_objects", 0) > 1000)
    assert metrics.engine.values["is_collecting"] == 1.0


@pytest.mark.parametrize("stops", [True, False], ids=["stopped", "killed"])
async def test_only_an_unexpected_end_of_a_worker_is_an_error(
    engine: WorkerClient, caplog: pytest.LogCaptureFixture, stops: bool
) -> None:
    caplog.set_level(logging.INFO)
    if stops:
        await engine.stop()
    else:
        os.kill(engine.info["pid"], signal.SIGKILL)
    await eventually(lambda: "the worker ended" in caplog.messages)
    levels = {record.levelname for record in caplog.records if record.message == "the worker ended"}
    assert levels == {"INFO" if stops else "ERROR"}
