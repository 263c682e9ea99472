"""Evaluations that are queued or run are a metric, and wait for the database."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from server.errors import DatabaseUnavailable
from server.quality import evaluation_runner
from tests.server.evaluations import EXAMPLES, evaluate, running, wait_until_ended
from tests.server.fakes import eventually

pytestmark = pytest.mark.anyio


async def test_unfinished_evaluations_are_counted(
    http: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = app.state.services
    await services.support_sets.create("colours", EXAMPLES)

    def numbers() -> dict[str, float]:
        collected = services.metrics.registry.collect()
        (gauge,) = [metric for metric in collected if metric.name == "flamboyance:evaluations_unfinished"]
        return {sample.labels["status"]: sample.value for sample in gauge.samples}

    monkeypatch.setattr(evaluation_runner, "COUNT_SECONDS", 0.01)
    for _ in range(3):
        created = await evaluate(http, methods=["nearest_mean"])
    await services.evaluations.claim("another server")
    assert await services.evaluations.num_unfinished() == {"queued": 2, "running": 1}
    await services.evaluations.release("another server")
    async with running(services):
        await wait_until_ended(http, created["id"])
        await eventually(lambda: numbers() == {"queued": 0, "running": 0})


async def test_without_the_database_each_attempt_logs_a_line(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    services = app.state.services

    async def claim(holder: str) -> None:
        raise DatabaseUnavailable("the database does not respond")

    monkeypatch.setattr(services.evaluations, "claim", claim)
    async with running(services):
        await eventually(lambda: any("cannot run" in record.message for record in caplog.records))
    (record,) = (record for record in caplog.records if record.name == evaluation_runner.__name__)
    assert (record.levelname, record.exc_info) == ("WARNING", None)
    app.state.services.database.close()
