"""A replica without Ray: what it reports about its models."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.app import create_app
from server.settings import Settings
from server.telemetry import logs
from server.telemetry.metrics import Metrics
from tests.server.fakes import FakeClient, served_model

with warnings.catch_warnings():  # of Ray's own modules
    warnings.simplefilter("ignore")
    from ray import serve

    from deploy.ray import replica as module
    from deploy.ray.application import Application
    from deploy.ray.replica import Replica


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Replica:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="a"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(module, "set_up_process", lambda: None)
    monkeypatch.setattr(logs, "configure", lambda level, log_format: None)
    return Replica(Settings())


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({"first": "ready"}, "ready"),
        ({"first": "restarting", "second": "ready"}, "restarting"),
        ({"second": "restarting", "third": "ready"}, "ready"),
        ({"second": "restarting"}, "starting"),
        ({}, "starting"),
    ],
    ids=str,
)
async def test_a_replica_is_ready_also_if_others_have_replaced_its_first_model(
    states: dict[str, str], expected: str, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load balancer sends nothing to a fleet that is not ready, so the first model would never be loaded again."""
    loaded = {name: SimpleNamespace(application=SimpleNamespace(engine_state=state)) for name, state in states.items()}
    monkeypatch.setattr(replica, "_configs", dict.fromkeys(("first", "second", "third")))
    monkeypatch.setattr(replica, "_loaded", loaded)
    assert await replica.readiness() == expected


@pytest.mark.anyio
async def test_metrics_are_written_outside_the_event_loop(
    replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrape of several models takes milliseconds, in which no stream would continue."""
    expose, threads = Metrics.expose, list[int]()

    def expose_and_note(self: Metrics, **options: bool) -> bytes:
        threads.append(threading.get_ident())
        return expose(self, **options)

    monkeypatch.setattr(Metrics, "expose", expose_and_note)
    app = create_app(FakeClient(), served_model(), Settings(data_dir=tmp_path), Metrics("tiny"))
    application = Application(app, FakeClient(), AsyncExitStack())  # type: ignore[arg-type]
    monkeypatch.setattr(replica, "_loaded", {"first": SimpleNamespace(application=application)})
    assert b'replica="a"' in await replica.metrics()
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


class Applications:
    """Applications without engines: those that run, by the folder of their model. They start while `may_start` is set."""

    def __init__(self) -> None:
        self.running: list[str | None] = []
        self.may_start = asyncio.Event()
        self.may_start.set()

    async def start(self, settings: Settings, *_: object) -> SimpleNamespace:
        await self.may_start.wait()
        self.running.append(settings.model)

        async def stop() -> None:
            self.running.remove(settings.model)

        return SimpleNamespace(stop=stop)


@pytest.fixture
def applications(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> Applications:
    applications = Applications()
    monkeypatch.setattr(module, "Application", applications)
    monkeypatch.setattr(module, "ServedModel", SimpleNamespace(load=lambda settings: None))
    monkeypatch.setattr(replica, "load", replica.load_model)
    return applications


def models(**folders: str) -> dict[str, Any]:
    return {"models": {name: {"settings": {"model": folder}} for name, folder in folders.items()}}


@pytest.mark.anyio
async def test_a_model_that_is_unloaded_during_an_update_does_not_stay(
    replica: Replica, applications: Applications
) -> None:
    """Ray unloads the least recently used one at any time."""
    await replica.reconfigure(models(first="old", second="old-2", third="old-3"))
    second, third = await replica.load_model("second"), await replica.load_model("third")
    applications.may_start.clear()
    update = asyncio.create_task(replica.reconfigure(models(first="old", second="new-2", third="new-3")))
    await asyncio.sleep(0)  # it starts the second model
    await second.close()
    await third.close()
    applications.may_start.set()
    await update
    assert applications.running == ["old"]


@pytest.mark.anyio
async def test_a_model_that_is_loaded_during_an_update_is_the_new_one(
    replica: Replica, applications: Applications
) -> None:
    await replica.reconfigure(models(first="first", second="old"))
    applications.may_start.clear()
    loading = asyncio.create_task(replica.load_model("second"))
    await asyncio.sleep(0)
    await replica.reconfigure(models(first="first", second="new"))
    applications.may_start.set()
    await loading
    assert applications.running == ["first", "new"]


@pytest.mark.anyio
async def test_a_model_that_an_update_removes_is_refused_by_the_first_one(
    replica: Replica, applications: Applications, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that has not heard of the update still sends it."""
    await replica.reconfigure(models(first="first", second="second"))
    loaded: list[str] = []

    async def load(name: str) -> SimpleNamespace:
        loaded.append(name)
        return SimpleNamespace(application=SimpleNamespace(answer=answer))

    async def answer(call: object) -> AsyncGenerator[list[dict[str, Any]], None]:
        yield [{"type": "http.response.body"}]

    monkeypatch.setattr(replica, "load", load)
    for name in ("second", "removed"):
        monkeypatch.setattr(serve, "get_multiplexed_model_id", lambda name=name: name)
        assert [messages async for messages in replica.answer(SimpleNamespace(attempt=0))]  # type: ignore[arg-type]
    assert loaded == ["second", "first"]
