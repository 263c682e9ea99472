"""Maintenance keeps pinned sets in every worker, deletes expired sets and updates the metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any, NoReturn

import httpx
import pytest
from fastapi import FastAPI

from server.errors import DatabaseUnavailable, EngineDied, StorageUnavailable
from server.fewshot import maintenance as maintenance_module
from server.fewshot.maintenance import Maintenance
from server.fewshot.retrieval import EmbeddingStore
from server.media.source import encoded
from server.wire import BACKGROUND_PRIORITY, Event, Generate
from tests.server.conftest import data_url, image_part, png
from tests.server.fakes import FakeClient, eventually

pytestmark = pytest.mark.anyio

SETS = "/v1/support_sets"


def example(name: str, colour: str) -> dict[str, Any]:
    return {"id": name, "text": name, "media": [image_part(png(colour))]}


async def create(http: httpx.AsyncClient, name: str, **fields: Any) -> None:
    response = await http.post(SETS, json={"name": name, **fields})
    assert response.status_code == 200, response.text


@pytest.fixture
def maintenance(app: FastAPI) -> Maintenance:
    services = app.state.services
    return Maintenance(
        services.support_sets,
        (services.support_sets.sweep, EmbeddingStore(services.database).sweep),
        app.state.tenants.warm_sets,
        services.engine,
        services.metrics,
        sweep_interval=3600,
    )


async def run_round(maintenance: Maintenance) -> None:
    """Run a round, and wait until its tasks have warmed the sets."""
    await asyncio.gather(*await maintenance.run_once())


def digests(*colours: str) -> set[bytes]:
    return {encoded(png(colour), "image", "").digest for colour in colours}


async def test_media_of_pinned_sets_stay_in_every_worker(
    http: httpx.AsyncClient, client: FakeClient, maintenance: Maintenance
) -> None:
    await create(http, "s", examples=[example("a", "red"), example("b", "blue")], pinned=True)
    await create(http, "t", examples=[example("a", "blue"), example("b", "green")], pinned=True)
    await create(http, "u", examples=[example("a", "black")])
    await run_round(maintenance)
    assert client.pinned == digests("red", "blue", "green")
    num_requests = len(client.requests)
    await run_round(maintenance)
    assert len(client.requests) == num_requests
    await http.patch(f"{SETS}/s", json={"pinned": False})
    await run_round(maintenance)
    assert client.pinned == digests("blue", "green")
    client.info, client.pinned = {"pid": "of another worker"}, set()
    await run_round(maintenance)
    assert client.pinned == digests("blue", "green")
    await http.delete(f"{SETS}/t")
    await run_round(maintenance)
    assert client.pinned == set()


async def test_shots_of_pinned_sets_stay_in_every_worker(
    http: httpx.AsyncClient, client: FakeClient, maintenance: Maintenance
) -> None:
    def pinned() -> set[bytes]:
        return {prompt.media[0] for prompt in client.pinned_prompts}

    for name, colour in (("s", "red"), ("t", "blue"), ("u", "green")):
        await create(http, name, examples=[example("a", colour)], pinned=name != "u")
        await warm(http, name, template="caption", shots_attend="alone")
    await run_round(maintenance)
    assert pinned() == digests("red", "blue")
    await http.patch(f"{SETS}/s", json={"pinned": False})
    await run_round(maintenance)
    assert pinned() == digests("blue")
    client.info, client.pinned_prompts = {"pid": "of another worker"}, []
    await run_round(maintenance)
    assert pinned() == digests("blue")
    await warm(http, "t", template="vqa", shots_attend="alone")
    await run_round(maintenance)
    assert pinned() == digests("blue")
    await warm(http, "t")
    await run_round(maintenance)
    assert client.pinned_prompts == []


async def test_a_pinned_set_is_embedded_and_so_are_added_examples(
    http: httpx.AsyncClient, client: FakeClient, maintenance: Maintenance
) -> None:
    await create(http, "s", examples=[example("a", "red"), example("b", "blue")], pinned=True)
    await create(http, "t", examples=[example("a", "green")])
    await run_round(maintenance)
    assert {media.digest for media in client.embedded} == digests("red", "blue")
    await http.post(f"{SETS}/s/examples", json={"examples": [example("c", "black")]})
    await run_round(maintenance)
    client.info = {"pid": "of another worker"}
    await run_round(maintenance)
    assert [media.digest for media in client.embedded[2:]] == [*digests("black")]
    query = {"query": {"image": data_url(png("white"))}}
    assert (await http.post(f"{SETS}/s/search", json=query)).is_success
    assert [media.digest for media in client.embedded[3:]] == [*digests("white")]


@pytest.mark.parametrize("trigger", ["worker", "sweep"])
async def test_failed_warming_is_retried_with_a_new_worker_or_after_a_sweep(
    http: httpx.AsyncClient, client: FakeClient, maintenance: Maintenance, app: FastAPI, trigger: str
) -> None:
    await create(http, "s", examples=[example("a", "red")], pinned=True)
    media = (await http.get(f"{SETS}/s/examples/a")).json()["media"][0]["image_id"]
    app.state.services.media_store.delete(media)
    await run_round(maintenance)
    app.state.services.media_store.put(png("red"), "image")
    await run_round(maintenance)
    assert client.pinned == set()
    if trigger == "worker":
        client.info = {"pid": "of another worker"}
    else:
        maintenance._next_sweep = 0
    await run_round(maintenance)
    assert client.pinned == digests("red")


async def test_a_sweep_that_fails_does_not_keep_sets_cold(
    http: httpx.AsyncClient,
    client: FakeClient,
    maintenance: Maintenance,
    app: FastAPI,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail() -> None:
        raise StorageUnavailable("a file cannot be deleted")

    async def note() -> None:
        swept.append("embeddings")

    swept = list[str]()
    monkeypatch.setattr(maintenance, "_sweeps", (fail, note))
    await create(http, "s", examples=[example("a", "red")], pinned=True)
    await run_round(maintenance)
    assert client.pinned == digests("red")
    assert swept == ["embeddings"]
    metrics = app.state.services.metrics.expose().decode()
    assert 'flamboyance:support_sets{model_name="tiny",status="ready"} 0.0' in metrics
    await run_round(maintenance)
    assert 'status="ready"} 1.0' in app.state.services.metrics.expose().decode()


async def test_a_long_sweep_keeps_no_set_cold(
    http: httpx.AsyncClient,
    client: FakeClient,
    maintenance: Maintenance,
    app: FastAPI,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swept: list[None] = []

    async def sweep_for_long() -> None:
        swept.append(None)
        await asyncio.sleep(3600)

    monkeypatch.setattr(maintenance, "_sweeps", (sweep_for_long,))
    monkeypatch.setattr(maintenance, "_sweep_interval", 0)
    task = asyncio.create_task(maintenance.run())
    await eventually(lambda: bool(swept))
    await create(http, "s", examples=[example("a", "red")], pinned=True)
    await eventually(lambda: client.pinned == digests("red"))
    await eventually(lambda: 'status="ready"} 1.0' in app.state.services.metrics.expose().decode())
    task.cancel()
    await asyncio.wait([task])
    assert len(swept) == 1


async def test_every_pinned_set_becomes_ready(
    http: httpx.AsyncClient, client: FakeClient, maintenance: Maintenance
) -> None:
    """Also a set whose media another pinned set has, a set without media, and a version that only lacks an example."""
    await create(http, "s", examples=[example("a", "red"), example("b", "blue")], pinned=True)
    await create(http, "t", examples=[example("a", "blue")], pinned=True)
    await create(http, "u", examples=[{"id": "a", "text": "a"}], pinned=True)
    await run_round(maintenance)
    await http.delete(f"{SETS}/s/examples", params={"id": "a"})
    await run_round(maintenance)
    cards = [(await http.get(f"{SETS}/{name}")).json() for name in "stu"]
    assert [(card["version"], card["status"]) for card in cards] == [(2, "ready"), (1, "ready"), (1, "ready")]
    num_requests = len(client.requests)
    await run_round(maintenance)
    assert len(client.requests) == num_requests


async def warm(http: httpx.AsyncClient, name: str, **fields: Any) -> dict[str, Any]:
    response = await http.post(f"{SETS}/{name}/warm", json={"wait": True, **fields})
    card: dict[str, Any] = response.json()
    return card


async def test_sets_that_were_warm_are_warmed_again_in_a_new_worker(
    http: httpx.AsyncClient, client: FakeClient, maintenance: Maintenance
) -> None:
    for name, colour in (("s", "red"), ("t", "blue"), ("cold", "green"), ("gone", "black"), ("pinned", "white")):
        await create(http, name, examples=[example("a", colour)])
        if name != "cold":
            await warm(http, name, template="caption" if name in ("t", "pinned") else None)
    await http.patch(f"{SETS}/pinned", json={"pinned": True})
    await run_round(maintenance)
    warmed = {name: (await http.get(f"{SETS}/{name}")).json()["warm"] for name in ("t", "pinned")}
    await http.delete(f"{SETS}/gone")
    client.info = {"pid": "of another worker"}
    client.requests.clear()
    await run_round(maintenance)
    assert all(request.priority == BACKGROUND_PRIORITY for request in client.requests)
    order = [next(iter(media)) for media in client.media[-len(client.requests) :]]
    assert order == [*digests("white")] * 2 + [*digests("red")] + [*digests("blue")] * 2
    statuses = {name: (await http.get(f"{SETS}/{name}")).json()["status"] for name in ("s", "t", "cold", "pinned")}
    assert statuses == {"s": "ready", "t": "ready", "cold": "pending", "pinned": "ready"}
    for name, before in warmed.items():
        assert (await http.get(f"{SETS}/{name}")).json()["warm"] == before
        assert before["prompt_tokens"] > 0
    await run_round(maintenance)
    assert len(client.requests) == 5


@pytest.mark.parametrize("pinned", [False, True])
async def test_a_set_during_whose_warming_every_worker_dies_is_left(
    http: httpx.AsyncClient, client: FakeClient, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    await create(http, "s", examples=[example("a", "red")], pinned=pinned)
    await warm(http, "s")

    async def die(request: Generate, media: Any) -> AsyncGenerator[Event, None]:
        client.requests.append(request)
        if client.requests:
            raise EngineDied("died")
        yield client.admitted

    client.requests.clear()
    with monkeypatch.context() as patched:
        patched.setattr(client, "stream", die)
        for worker in range(6):
            client.info = {"pid": worker}
            await run_round(maintenance)
    assert len(client.requests) == 3
    assert (await http.get(f"{SETS}/s")).json()["status"] in ("failed", "pending")
    assert (await warm(http, "s"))["status"] == "ready"
    client.info = {"pid": "the next"}
    await run_round(maintenance)
    assert (await http.get(f"{SETS}/s")).json()["status"] == "ready"


async def test_expired_sets_are_swept_and_counted(
    http: httpx.AsyncClient, maintenance: Maintenance, app: FastAPI
) -> None:
    await create(http, "s", examples=[example("a", "red")], ttl_seconds=0.05)
    await create(http, "t", examples=[example("a", "blue")])
    await http.post(f"{SETS}/t/warm", json={"wait": True})
    await asyncio.sleep(0.06)
    await run_round(maintenance)
    await run_round(maintenance)
    metrics = (await http.get("/metrics")).text
    assert 'flamboyance:support_sets{model_name="tiny",status="ready"} 1.0' in metrics
    assert 'flamboyance:support_sets{model_name="tiny",status="pending"} 0.0' in metrics
    assert f'flamboyance:support_set_media_bytes{{model_name="tiny"}} {float(len(png("blue")))}' in metrics
    stored = app.state.services.media_store
    assert set(stored.names()) == {f"img_{digest.hex()}" for digest in digests("blue")}


async def test_rounds_pause_for_much_longer_than_they_take(
    maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[float] = []

    async def run_once() -> None:
        maintenance._support_sets.changed.set()  # a client changes its sets without end
        await asyncio.sleep(0.02)
        rounds.append(time.monotonic())

    monkeypatch.setattr(maintenance, "run_once", run_once)
    task = asyncio.create_task(maintenance.run())
    await eventually(lambda: len(rounds) == 4)
    task.cancel()
    await asyncio.wait([task])
    assert rounds[3] - rounds[0] > 3 * (1 + maintenance_module.REST_OF_ROUNDS) * 0.02


async def test_a_change_that_could_not_be_counted_is_counted_in_the_next_round(
    http: httpx.AsyncClient, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> NoReturn:
        raise DatabaseUnavailable("gone")

    await run_round(maintenance)  # the sweep, which counts all sets, is not due again
    await create(http, "s", examples=[example("a", "red")])
    with monkeypatch.context() as patched:
        patched.setattr(maintenance._support_sets, "totals", fail)
        with pytest.raises(DatabaseUnavailable):
            await maintenance.run_once()
    assert not maintenance._support_sets.changed.is_set()  # which would begin the next round at once
    await run_round(maintenance)
    metrics = (await http.get("/metrics")).text
    assert f'flamboyance:support_set_media_bytes{{model_name="tiny"}} {float(len(png("red")))}' in metrics


async def test_the_task_continues_after_an_error_and_wakes_at_a_change(
    http: httpx.AsyncClient, client: FakeClient, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance_module, "POLL_SECONDS", 3600)
    errors = [DatabaseUnavailable("gone"), RuntimeError("a bug")]
    run_once = maintenance.run_once

    async def fail_first() -> None:
        if errors:
            maintenance._support_sets.changed.set()
            raise errors.pop()
        await run_once()

    monkeypatch.setattr(maintenance, "run_once", fail_first)
    task = asyncio.create_task(maintenance.run())
    await eventually(lambda: not errors)
    await create(http, "s", examples=[example("a", "red")], pinned=True)
    await eventually(lambda: client.pinned == digests("red"))
    task.cancel()
