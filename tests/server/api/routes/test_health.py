"""The routes of health: an idle server is ready, and one that makes no progress is not."""

from __future__ import annotations

import threading

import httpx
import pytest
from fastapi import FastAPI

from server.engine_client.supervisor import State
from server.telemetry.metrics import Metrics
from tests.server.fakes import FakeClient

pytestmark = pytest.mark.anyio


async def ready(http: httpx.AsyncClient) -> tuple[int, str]:
    response = await http.get("/health/ready")
    return response.status_code, response.json()["status"]


async def test_an_idle_server_is_ready(http: httpx.AsyncClient) -> None:
    assert await ready(http) == (200, "ready")
    health = (await http.get("/health")).json()
    assert health == {"status": "ready", "model": "tiny", "engine": {"device": "fake"}}


@pytest.mark.parametrize("state", ["starting", "restarting", "failed", "stopped"])
async def test_without_a_ready_worker_the_server_is_live_but_not_ready(
    http: httpx.AsyncClient, client: FakeClient, state: State
) -> None:
    client.state = state
    assert await ready(http) == (503, state)
    assert (await http.get("/health")).status_code == 503
    assert (await http.get("/health/live")).status_code == 200


async def test_a_worker_without_progress_is_not_ready(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.step_age = 119.0
    assert await ready(http) == (200, "ready")
    client.step_age = 121.0
    assert await ready(http) == (503, "stalled")
    progress = await http.get("/health/progress")
    assert (progress.status_code, progress.json()["last_step_age_seconds"]) == (503, 121.0)
    assert "flamboyance:last_step_age_seconds" in (await http.get("/metrics")).text


async def test_during_shutdown_the_server_is_not_ready_and_refuses_requests(
    http: httpx.AsyncClient, app: FastAPI
) -> None:
    app.state.services.admission.close()
    assert await ready(http) == (503, "shutting_down")
    response = await http.post("/v1/completions", json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
    assert response.headers["connection"] == "close"


async def test_the_version_includes_the_engine(http: httpx.AsyncClient) -> None:
    expected = {"version": "0.1.0", "engine": {"device": "fake"}, "weights": []}
    assert (await http.get("/version")).json() == expected


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics", "/", "/docs", "/v1/models"])
async def test_head_has_the_headers_of_get_and_no_body(http: httpx.AsyncClient, path: str) -> None:
    head, full = await http.head(path), await http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == full.headers["content-type"]
    assert "content-length" in head.headers


async def test_metrics_are_written_outside_the_event_loop(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes milliseconds, for which requests of other clients would wait once per connection of a scraper."""
    expose, threads = Metrics.expose, list[int]()

    def expose_and_note(self: Metrics, **options: bool) -> bytes:
        threads.append(threading.get_ident())
        return expose(self, **options)

    monkeypatch.setattr(Metrics, "expose", expose_and_note)
    assert (await http.get("/metrics")).status_code == 200
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
