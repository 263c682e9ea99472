"""Maintenance keeps pinned sets in every worker, deletes expired sets and updates the metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.errors import DatabaseUnavailable
from server.fewshot import warming as warming_module
from server.fewshot.retrieval import EmbeddingStore
from server.fewshot.warming import Maintenance
from server.media.source import encoded
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
        EmbeddingStore(services.database),
        services.warming,
        services.client,
        services.metrics,
        sweep_interval=3600,
    )


def digests(*colours: str) -> set[bytes]:
    return {encoded(png(colour), "image", "").digest for colour in colours}


async def test_media_of_pinned_sets_stay_in_every_worker(
    http: httpx.AsyncClient, client: FakeClient, maintenance: Maintenance
) -> None:
    await create(http, "s", examples=[example("a", "red"), example("b", "blue")], pinned=True)
    await create(http, "t", examples=[example("a", "blue"), example("b", "green")], pinned=True)
    await create(http, "u", examples=[example("a", "black")])
    await maintenance.run_once()
    assert client.pinned == digests("red", "blue", "green")
    num_requests = len(client.requests)
    await maintenance.run_once()
    assert len(client.requests) == num_requests
    await http.patch(f"{SETS}/s", json={"pinned": False})
    await maintenance.run_once()
    assert client.pinned == digests("blue", "green")
    client.info, client.pinned = {"pid": "of another worker"}, set()
    await maintenance.run_once()
    assert client.pinned == digests("blue", "green")
    await http.delete(f"{SETS}/t")
    await maintenance.run_once()
    assert client.pinned == set()


async def test_a_pinned_set_is_embedded_and_so_are_added_examples(
    http: httpx.AsyncClient, client: FakeClient, maintenance: Maintenance
) -> None:
    await create(http, "s", examples=[example("a", "red"), example("b", "blue")], pinned=True)
    await create(http, "t", examples=[example("a", "green")])
    await maintenance.run_once()
    assert {media.digest for media in client.embedded} == digests("red", "blue")
    await http.post(f"{SETS}/s/examples", json={"examples": [example("c", "black")]})
    await maintenance.run_once()
    client.info = {"pid": "of another worker"}
    await maintenance.run_once()
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
    app.state.services.store.delete(media)
    await maintenance.run_once()
    app.state.services.store.put(png("red"), "image")
    await maintenance.run_once()
    assert client.pinned == set()
    if trigger == "worker":
        client.info = {"pid": "of another worker"}
    else:
        maintenance._next_sweep = 0
    await maintenance.run_once()
    assert client.pinned == digests("red")


async def test_expired_sets_are_swept_and_counted(
    http: httpx.AsyncClient, maintenance: Maintenance, app: FastAPI
) -> None:
    await create(http, "s", examples=[example("a", "red")], ttl_seconds=0.05)
    await create(http, "t", examples=[example("a", "blue")])
    await http.post(f"{SETS}/t/warm", json={"wait": True})
    await asyncio.sleep(0.06)
    await maintenance.run_once()
    metrics = (await http.get("/metrics")).text
    assert 'flamboyance:support_sets{model_name="tiny",status="ready"} 1.0' in metrics
    assert 'flamboyance:support_sets{model_name="tiny",status="pending"} 0.0' in metrics
    assert f'flamboyance:support_set_media_bytes{{model_name="tiny"}} {float(len(png("blue")))}' in metrics
    stored = app.state.services.store
    assert set(stored.names()) == {f"img_{digest.hex()}" for digest in digests("blue")}


async def test_the_task_continues_after_an_error_and_wakes_at_a_change(
    http: httpx.AsyncClient, client: FakeClient, maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warming_module, "POLL_SECONDS", 3600)
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
