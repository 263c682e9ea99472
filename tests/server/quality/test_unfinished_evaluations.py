"""Evaluations that are queued or run are a metric."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

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
