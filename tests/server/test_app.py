"""The application stops what it has started, also if starting the rest fails, and a bug is one request's."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from server.errors import DatabaseUnavailable
from server.quality.evaluation_runner import EvaluationRunner
from server.store.support_sets import SupportSets
from tests.server.fakes import FakeClient

pytestmark = pytest.mark.anyio


class RecordingClient(FakeClient):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    async def start(self) -> None:
        self.calls.append("start")

    async def stop(self) -> None:
        self.calls.append("stop")


@pytest.fixture
def client() -> RecordingClient:
    return RecordingClient()


async def unavailable(_runner: EvaluationRunner) -> None:
    raise DatabaseUnavailable("it is gone")


@pytest.mark.parametrize("step", ["start", "stop"])
async def test_the_client_is_stopped_if_the_evaluations_fail(
    app: FastAPI, client: RecordingClient, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvaluationRunner, step, unavailable)
    with pytest.raises(DatabaseUnavailable):
        async with app.router.lifespan_context(app):
            pass
    assert client.calls == ["start", "stop"]
    with pytest.raises(RuntimeError, match="after shutdown"):
        await app.state.services.support_sets.totals()


async def test_a_bug_is_an_internal_error_on_a_connection_that_ends(
    app: FastAPI, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server closes the connection after a bug, so the client must not send another request on it."""

    async def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(SupportSets, "page", broken)
    response = await http.get("/v1/support_sets")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert response.headers["connection"] == "close"
    assert 'request_refused_total{code="internal_error"' in app.state.services.metrics.expose().decode()
