"""A labelled support set, a client whose answers to it are known, and requests for evaluations."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from server.api.services import Services
from server.limits.background import Background
from server.media.source import encoded
from server.quality.evaluation_runner import EvaluationRunner
from server.quality.leave_one_out import LeaveOneOut
from server.store.records import NewExample
from server.wire import Score
from tests.server.conftest import png
from tests.server.fakes import TOKENIZER

COLOURS = ("red", "darkred", "tomato", "blue", "navy", "skyblue")
LABELS = dict(zip(COLOURS, ("warm",) * 3 + ("cold",) * 3, strict=True))
MEDIA = {colour: encoded(png(colour), "image", "") for colour in COLOURS}
LABEL_OF = {MEDIA[colour].digest: label for colour, label in LABELS.items()}
EXAMPLES = [
    NewExample(id=colour, media=(MEDIA[colour],), label=label, question="q") for colour, label in LABELS.items()
]

Logprobs = Callable[[Score, list[int]], list[float]]


def correct_label(request: Score) -> str:
    return LABEL_OF[request.prompt.media[-1]]


def logprobs_of(share: float, request: Score, candidate: list[int]) -> list[float]:
    """Return log-probabilities that give the correct label the probability `share`, and the other label the rest."""
    label = TOKENIZER.decode(candidate).strip()
    return [math.log(share if label == correct_label(request) else 1 - share)] + [0.0] * (len(candidate) - 1)


def constant_share(share: float) -> Logprobs:
    return lambda request, candidate: logprobs_of(share, request, candidate)


@asynccontextmanager
async def running(services: Services) -> AsyncIterator[EvaluationRunner]:
    leave_one_out = LeaveOneOut(services.shots, services.comparison, services.engine, services.model, services.metrics)
    background = Background(services.admission)
    num_lanes = services.settings.evaluation_queries
    runner = EvaluationRunner(services.evaluations, lambda _: leave_one_out, services.metrics, background, num_lanes)
    await runner.start()
    try:
        yield runner
    finally:
        await runner.stop()


async def evaluate(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await http.post("/v1/support_sets/colours/evaluate", json=fields)
    assert response.status_code == 202, response.text
    evaluation: dict[str, Any] = response.json()
    return evaluation


async def read(http: httpx.AsyncClient, evaluation_id: str) -> dict[str, Any]:
    response = await http.get(f"/v1/evaluations/{evaluation_id}")
    assert response.status_code == 200, response.text
    evaluation: dict[str, Any] = response.json()
    return evaluation


async def wait_until_ended(http: httpx.AsyncClient, evaluation_id: str, seconds: float = 20.0) -> dict[str, Any]:
    async with asyncio.timeout(seconds):
        while (evaluation := await read(http, evaluation_id))["status"] in ("queued", "running"):
            await asyncio.sleep(0.01)
    return evaluation


async def run_evaluation(http: httpx.AsyncClient, services: Services, **fields: Any) -> dict[str, Any]:
    """Request an evaluation, run it to its end and return it."""
    async with running(services):
        return await wait_until_ended(http, (await evaluate(http, **fields))["id"])


def vectors_by_label() -> dict[bytes | tuple[int, ...], NDArray[np.float32]]:
    """Return vectors of media by which likeness tells the labels apart."""
    return {digest: np.eye(2, dtype=np.float32)[int(label == "warm")] + 0.1 for digest, label in LABEL_OF.items()}
