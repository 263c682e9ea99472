"""Leave-one-out by its front door: a support set whose answers are known, evaluated behind a client that tells them."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.services import Services
from server.app import create_app
from server.errors import EngineNotReady, InvalidMedia
from server.media.source import encoded
from server.metrics import Metrics
from server.quality import evaluation_runner
from server.quality.evaluation_runner import PRIORITY, EvaluationRunner, LeaveOneOut
from server.quality.evaluation_store import LEASE_SECONDS
from server.settings import Settings
from server.store.records import NewExample
from server.wire import Score
from tests.server.conftest import picture
from tests.server.fakes import TOKENIZER, FakeClient, eventually, served_model

pytestmark = pytest.mark.anyio

COLOURS = ("red", "darkred", "tomato", "blue", "navy", "skyblue")
LABELS = dict(zip(COLOURS, ("warm",) * 3 + ("cold",) * 3, strict=True))
MEDIA = {colour: encoded(picture(colour), "image", "") for colour in COLOURS}
LABEL_OF = {MEDIA[colour].digest: label for colour, label in LABELS.items()}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_media_per_request=6)


@pytest.fixture(autouse=True)
def in_no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_runner, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(evaluation_runner, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(evaluation_runner, "POLL_SECONDS", 0.05)


@pytest.fixture
async def services(app: FastAPI) -> Services:
    services: Services = app.state.services
    examples = [
        NewExample(id=colour, media=(MEDIA[colour],), label=label, question="q") for colour, label in LABELS.items()
    ]
    await services.support_sets.create("colours", examples)
    return services


@asynccontextmanager
async def running(services: Services) -> AsyncIterator[EvaluationRunner]:
    leave_one_out = LeaveOneOut(services.shots, services.client, services.model, services.metrics)
    runner = EvaluationRunner(services.evaluations, leave_one_out, services.settings.evaluation_queries)
    await runner.start()
    try:
        yield runner
    finally:
        await runner.stop()


def right_of(request: Score) -> str:
    return LABEL_OF[request.prompt.media[-1]]


def sure(share: float) -> Any:
    """The engine gives the right label this probability."""

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        label = TOKENIZER.decode(candidate).strip()
        return [math.log(share if label == right_of(request) else 1 - share)] + [0.0] * (len(candidate) - 1)

    return logprobs


async def evaluate(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await http.post("/v1/support_sets/colours/evaluate", json=fields)
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def read(http: httpx.AsyncClient, name: str) -> dict[str, Any]:
    answer = await http.get(f"/v1/evaluations/{name}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def ended(http: httpx.AsyncClient, name: str, seconds: float = 20.0) -> dict[str, Any]:
    async with asyncio.timeout(seconds):
        while (found := await read(http, name))["status"] in ("queued", "running"):
            await asyncio.sleep(0.01)
    return found


async def test_every_example_is_left_out_once(http: httpx.AsyncClient, client: FakeClient, services: Services) -> None:
    client.logprobs = sure(0.8)
    async with running(services):
        made = await evaluate(http, k=[2], strategies=["random"], seeds=[4])
        assert made["status"] == "queued"
        found = await ended(http, made["id"])
    assert found["status"] == "completed"
    assert Counter(request.prompt.media[-1] for request in client.scores) == Counter(LABEL_OF.keys())
    for request in client.scores:
        assert request.prompt.media[-1] not in request.prompt.media[:-1]
        assert len(request.prompt.media) == 3
        assert request.priority == PRIORITY
    (cell,) = found["cells"]
    assert (cell["strategy"], cell["k"], cell["seed"]) == ("random", 2, 4)
    assert (cell["queries"], cell["accuracy"]) == (6, 1.0)
    assert cell["confusion"] == {"warm": {"warm": 3}, "cold": {"cold": 3}}
    assert cell["expected_calibration_error"] == pytest.approx(0.2)
    assert cell["brier"] == pytest.approx(2 * 0.2**2)
    assert cell["nll"] == pytest.approx(-math.log(0.8))
    assert cell["latency"]["queries"] == 6
    assert 0 < cell["latency"]["median_seconds"] <= cell["latency"]["p90_seconds"]
    assert cell["cost"]["prompt_tokens"] == len(client.scores[0].prompt.token_ids)
    assert found["progress"] == {"cells": 1, "cells_done": 1, "queries": 6, "queries_done": 6}
    assert found["labels"] == ["warm", "cold"]
    assert found["baseline"]["accuracy"] == 0.5


async def test_what_is_recommended_can_be_sent_as_it_is(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    """More shots help up to two."""

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        label, shots = TOKENIZER.decode(candidate).strip(), len(request.prompt.media) - 1
        share = 0.9 if shots >= 2 else 0.4
        return [math.log(share if label == right_of(request) else 1 - share)] + [0.0] * (len(candidate) - 1)

    client.logprobs = logprobs
    async with running(services):
        found = await ended(http, (await evaluate(http, k=[0, 1, 2, 4], strategies=["random", "rices_image"]))["id"])
    assert [(row["strategy"], row["k"], row["accuracy"]) for row in found["summary"]] == [
        ("first", 0, 0.0),
        ("random", 1, 0.0),
        ("rices_image", 1, 0.0),
        ("random", 2, 1.0),
        ("rices_image", 2, 1.0),
        ("random", 4, 1.0),
        ("rices_image", 4, 1.0),
    ]
    recommended = found["recommendation"]
    assert (recommended["examples"]["k"], recommended["accuracy"]) == (2, 1.0)
    assert recommended["reason"]
    body = {
        "examples": recommended["examples"],
        "query": {"image": MEDIA["red"].id},
        "template": "classification",
    }
    answer = await http.post("/v1/classify", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["label"] == "warm"


async def test_rices_never_chooses_the_left_out_example(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    async with running(services):
        found = await ended(http, (await evaluate(http, k=[5], strategies=["rices_image"]))["id"])
    assert found["status"] == "completed"
    assert all(sorted(request.prompt.media) == sorted(LABEL_OF) for request in client.scores)
    assert all(request.prompt.media[-1] not in request.prompt.media[:-1] for request in client.scores)


async def test_weighing_reaches_the_classification(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    async with running(services):
        made = await evaluate(
            http, k=[2], strategies=["first"], permutations=2, calibration="contextual", content_free="no_media"
        )
        await ended(http, made["id"])
    assert len(client.scores) == 6 * 2 * 2
    assert made["request"]["permutations"] == 2


async def test_large_sets_are_sampled_by_label(http: httpx.AsyncClient, client: FakeClient, services: Services) -> None:
    async with running(services):
        found = await ended(http, (await evaluate(http, k=[1], strategies=["first"], max_queries=4))["id"])
    assert Counter(map(right_of, client.scores)) == {"warm": 2, "cold": 2}
    assert (found["queries"], found["examples"]) == (4, 6)


async def test_an_engine_that_is_away_is_waited_for(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    refusals = 3

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise EngineNotReady("restarting")
        return list(sure(0.7)(request, candidate))

    client.logprobs = logprobs
    async with running(services):
        found = await ended(http, (await evaluate(http, k=[1], strategies=["first"]))["id"])
    assert (found["status"], found["cells"][0]["accuracy"], refusals) == ("completed", 1.0, 0)


async def test_a_cell_that_cannot_be_fails_alone(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        if len(request.prompt.media) > 2:
            raise InvalidMedia("broken picture")
        return list(sure(0.7)(request, candidate))

    client.logprobs = logprobs
    async with running(services):
        found = await ended(http, (await evaluate(http, k=[1, 2], strategies=["first"]))["id"])
    assert found["status"] == "completed"
    assert [cell["status"] for cell in found["cells"]] == ["completed", "failed"]
    assert found["cells"][1]["error"] == {"code": "invalid_media", "message": "broken picture"}
    assert found["recommendation"]["examples"]["k"] == 1


class Gate:
    """Lets some scores through, then holds the rest back."""

    def __init__(self, client: FakeClient, free: int) -> None:
        self.opened = asyncio.Event()
        self.free = free
        self._score = client.score
        client.score = self.score  # type: ignore[method-assign]

    async def score(self, request: Score, media: Any) -> Any:
        self.free -= 1
        if self.free < 0:
            await self.opened.wait()
        return await self._score(request, media)


async def test_finished_cells_survive_a_restart(
    http: httpx.AsyncClient, client: FakeClient, services: Services, settings: Settings
) -> None:
    client.logprobs = sure(0.8)
    gate = Gate(client, free=6 + 3)
    async with running(services):
        made = await evaluate(http, k=[1, 2], strategies=["first"])
        await eventually(lambda: len(client.scores) == 9)
        await eventually(lambda: gate.free < 0)
    stopped = await read(http, made["id"])
    assert (stopped["status"], stopped["progress"]["cells_done"]) == ("running", 1)
    again = FakeClient()
    again.logprobs = sure(0.8)
    app = create_app(again, served_model(), settings, Metrics("tiny"))
    async with running(app.state.services):
        found = await ended(http, made["id"])
    await app.state.services.decoder.stop()
    assert found["status"] == "completed"
    assert [cell["k"] for cell in found["cells"]] == [1, 2]
    assert len(again.scores) == 6  # the second cell alone


async def test_a_dead_server_is_relieved_when_its_lease_has_run_out(
    http: httpx.AsyncClient, client: FakeClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await evaluate(http, k=[1], strategies=["first"])
    assert await services.evaluations.claim("a server that dies") is not None
    assert await services.evaluations.claim("another") is None
    now = time.time()
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + LEASE_SECONDS + 1)
        taken = await services.evaluations.claim("another")
    assert taken is not None
    assert taken.id == made["id"]
    # the first one is not dead after all: it learns that it has lost
    assert not await services.evaluations.renew(made["id"], "a server that dies", 3)
    assert not await services.evaluations.finish_cell(made["id"], "a server that dies", 0, {}, 3)
    assert await services.evaluations.renew(made["id"], "another", 0)


async def test_cancelled_work_stops(http: httpx.AsyncClient, client: FakeClient, services: Services) -> None:
    Gate(client, free=2)
    async with running(services):
        made = await evaluate(http, k=[1], strategies=["first"])
        await eventually(lambda: len(client.scores) == 2)
        cancelled = await http.post(f"/v1/evaluations/{made['id']}/cancel")
        assert cancelled.json()["status"] == "cancelled"
        other = await evaluate(http, k=[0], strategies=["first"], max_queries=1)
        # the other one is begun, so the first has been left
        async with asyncio.timeout(20):
            while (await read(http, other["id"]))["status"] == "queued":
                await asyncio.sleep(0.01)
    assert (await read(http, made["id"]))["status"] == "cancelled"
    assert (await read(http, made["id"]))["cells"] == []


async def test_what_is_deleted_is_gone(http: httpx.AsyncClient, client: FakeClient, services: Services) -> None:
    async with running(services):
        made = await evaluate(http, k=[1], strategies=["first"])
        await ended(http, made["id"])
    answer = await http.delete(f"/v1/evaluations/{made['id']}")
    assert answer.json() == {"id": made["id"], "object": "evaluation", "deleted": True}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
        gone = await http.request(method, f"/v1/evaluations/{made['id']}{path}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "evaluation_not_found")


async def test_a_support_set_that_is_gone_fails_its_evaluation(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    made = await evaluate(http, k=[1], strategies=["first"])
    await services.support_sets.delete("colours")
    async with running(services):
        found = await ended(http, made["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "support_set_not_found")


async def test_a_bug_fails_its_evaluation_and_no_other(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        if len(request.prompt.media) == 2:
            raise ZeroDivisionError
        return list(sure(0.7)(request, candidate))

    client.logprobs = logprobs
    async with running(services):
        first, second = [await evaluate(http, k=[k], strategies=["first"]) for k in (1, 2)]
        assert (await ended(http, first["id"]))["error"] == {"code": "internal_error", "message": "internal error"}
        assert (await ended(http, second["id"]))["status"] == "completed"


async def test_a_list_goes_on_behind_its_last_id(http: httpx.AsyncClient, services: Services) -> None:
    made = [(await evaluate(http, k=[1], strategies=["first"]))["id"] for _ in range(3)]
    page = (await http.get("/v1/evaluations", params={"limit": 2})).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (made[:2], True)
    rest = (await http.get("/v1/evaluations", params={"after": page["last_id"]})).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (made[2:], False)
    of_another = (await http.get("/v1/evaluations", params={"support_set": "ss_0"})).json()
    assert of_another["data"] == []


async def test_the_version_that_was_asked_is_evaluated(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    await services.support_sets.put_examples("colours", [NewExample(id="new", media=(MEDIA["red"],), label="hot")])
    assert (await evaluate(http, version=1))["labels"] == ["warm", "cold"]
    assert (await evaluate(http))["labels"] == ["warm", "cold", "hot"]


async def test_defaults_fit_the_support_set(http: httpx.AsyncClient, services: Services) -> None:
    """Five others and six media a request: k goes up to five."""
    made = await evaluate(http)
    cells = (await services.evaluations.get(made["id"])).plan["settled"]["cells"]
    assert sorted({cell["k"] for cell in cells}) == [0, 1, 2, 4]
    assert {cell["strategy"] for cell in cells} == {"first", "random", "rices_image"}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"k": [6]}, 400, "k"),
        ({"k": [-1]}, 400, "k[0]"),
        ({"strategies": ["best"]}, 400, "strategies[0]"),
        ({"strategies": ["random"], "order": "similar_last"}, 400, "order"),
        ({"candidates": ["warm"]}, 400, "candidates"),
        ({"candidates": ["warm", "cold", "warm"]}, 400, "candidates[2]"),
        ({"template": "poem"}, 400, "template"),
        ({"seeds": []}, 400, "seeds"),
        ({"seeds": list(range(32)), "k": [1, 2, 3, 4, 5], "strategies": ["random", "balanced"]}, 400, "k"),
        ({"max_queries": 0}, 400, "max_queries"),
        ({"version": 2}, 404, "version"),
        ({"shots": []}, 422, "shots"),
    ],
)
async def test_a_wrong_field_is_refused_by_name(
    http: httpx.AsyncClient, services: Services, fields: dict[str, Any], status: int, param: str | None
) -> None:
    answer = await http.post("/v1/support_sets/colours/evaluate", json=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


async def test_an_example_without_an_answer_is_refused(http: httpx.AsyncClient, services: Services) -> None:
    await services.support_sets.put_examples("colours", [NewExample(id="what", media=(MEDIA["red"],))])
    answer = await http.post("/v1/support_sets/colours/evaluate", json={})
    assert (answer.status_code, "'what'" in answer.json()["error"]["message"]) == (400, True)


async def test_one_example_cannot_be_left_out(http: httpx.AsyncClient, services: Services) -> None:
    await services.support_sets.create("one", [NewExample(id="a", media=(MEDIA["red"],), label="warm")])
    answer = await http.post("/v1/support_sets/one/evaluate", json={})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "k")
