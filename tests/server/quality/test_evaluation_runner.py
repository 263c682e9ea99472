"""Leave-one-out evaluations of a support set, with a client whose answers are known."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from typing import Any

import httpx
import numpy as np
import pytest

from server.api.services import Services
from server.app import create_app
from server.errors import EngineNotReady, InvalidMedia
from server.limits import background
from server.quality import evaluation_runner
from server.quality.evaluation_store import LEASE_SECONDS
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.wire import BACKGROUND_PRIORITY, Score
from tests.server.evaluations import (
    LABEL_OF,
    MEDIA,
    constant_share,
    correct_label,
    evaluate,
    logprobs_of,
    read,
    run_evaluation,
    running,
    vectors_by_label,
    wait_until_ended,
)
from tests.server.fakes import TOKENIZER, FakeClient, eventually, served_model

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_runner, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(evaluation_runner, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(evaluation_runner, "POLL_SECONDS", 0.05)


async def test_every_example_is_left_out_once(http: httpx.AsyncClient, client: FakeClient, services: Services) -> None:
    client.logprobs = constant_share(0.8)
    async with running(services):
        created = await evaluate(http, k=[2], strategies=["random"], seeds=[4], methods=["in_context"])
        assert created["status"] == "queued"
        evaluation = await wait_until_ended(http, created["id"])
    assert evaluation["status"] == "completed"
    assert Counter(request.prompt.media[-1] for request in client.scores) == Counter(LABEL_OF.keys())
    for request in client.scores:
        assert request.prompt.media[-1] not in request.prompt.media[:-1]
        assert len(request.prompt.media) == 3
        assert request.priority == BACKGROUND_PRIORITY
    (cell,) = evaluation["cells"]
    assert (cell["strategy"], cell["k"], cell["seed"]) == ("random", 2, 4)
    assert (cell["queries"], cell["accuracy"]) == (6, 1.0)
    assert cell["confusion"] == {"warm": {"warm": 3}, "cold": {"cold": 3}}
    # each answer is right, so those to other queries make the model surer than it is
    odds = 4 ** (1 / cell["temperature"])
    share = cell["curve"][0]["confidence"]
    assert (cell["temperature"] < 1, share) == (True, pytest.approx(odds / (1 + odds)))
    assert cell["curve"] == [{"threshold": 0.0, "coverage": 1.0, "accuracy": 1.0, "confidence": share}]
    of_others = 1 - cell["expected_calibration_error"]
    assert 0.8 < of_others <= share
    assert cell["brier"] == pytest.approx(2 * (1 - of_others) ** 2)
    assert cell["nll"] == pytest.approx(-math.log(of_others))
    assert cell["latency"]["queries"] == 6
    assert 0 < cell["latency"]["median_seconds"] <= cell["latency"]["p90_seconds"]
    assert cell["cost"]["prompt_tokens"] == len(client.scores[0].prompt.token_ids)
    assert evaluation["progress"] == {
        "cells": 1,
        "cells_done": 1,
        "queries": 6,
        "queries_done": 6,
        "seconds_left": None,
    }
    assert evaluation["labels"] == ["warm", "cold"]
    assert evaluation["baseline"]["accuracy"] == 0.5


async def test_the_recommendation_can_be_sent_unchanged(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    """The client answers correctly with two or more shots."""

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        num_shots = len(request.prompt.media) - 1
        return logprobs_of(0.9 if num_shots >= 2 else 0.4, request, candidate)

    client.logprobs = logprobs
    prompts = {"k": [0, 1, 2, 4], "strategies": ["random", "rices_image"]}
    evaluation = await run_evaluation(http, services, **prompts, methods=["in_context"])
    assert [(row["strategy"], row["k"], row["accuracy"]) for row in evaluation["summary"]] == [
        ("first", 0, 0.0),
        ("random", 1, 0.0),
        ("rices_image", 1, 0.0),
        ("random", 2, 1.0),
        ("rices_image", 2, 1.0),
        ("random", 4, 1.0),
        ("rices_image", 4, 1.0),
    ]
    recommended = evaluation["recommendation"]
    assert (recommended["request"]["examples"]["k"], recommended["accuracy"]) == (2, 1.0)
    assert recommended["reason"]
    body = {**recommended["request"], "query": {"image": MEDIA["red"].id}}
    response = await http.post("/v1/classify", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["label"] == "warm"


async def test_rices_never_selects_the_left_out_example(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    evaluation = await run_evaluation(http, services, k=[5], strategies=["rices_image"])
    assert evaluation["status"] == "completed"
    assert all(sorted(request.prompt.media) == sorted(LABEL_OF) for request in client.scores)
    assert all(request.prompt.media[-1] not in request.prompt.media[:-1] for request in client.scores)


async def test_weighing_options_apply_to_the_classification(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    async with running(services):
        created = await evaluate(
            http, k=[2], strategies=["first"], permutations=2, calibration="contextual", content_free="no_media"
        )
        await wait_until_ended(http, created["id"])
    assert len(client.scores) == 6 * 2 * 2
    assert created["request"]["permutations"] == 2


async def test_a_template_of_the_client_is_used(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    template = {"shot": "{media}Colour: {label}", "end": "\n"}
    evaluation = await run_evaluation(http, services, k=[1], strategies=["first"], template=template)
    assert (evaluation["status"], evaluation["error"]) == ("completed", None)
    assert "Colour: warm\n" in TOKENIZER.decode(client.scores[0].prompt.token_ids)


async def test_max_queries_samples_labels_equally(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    evaluation = await run_evaluation(http, services, k=[1], strategies=["first"], max_queries=4)
    assert Counter(map(correct_label, client.scores)) == {"warm": 2, "cold": 2}
    assert (evaluation["queries"], evaluation["examples"]) == (4, 6)


async def test_methods_are_evaluated_on_the_same_prompts(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    """Likeness is of the examples that are not left out, and the blend reads no prompt of its own."""
    client.logprobs = constant_share(0.8)
    client.vectors = vectors_by_label()
    client.vectors[MEDIA["navy"].digest] = np.eye(2, dtype=np.float32)[1]  # as if it were warm
    evaluation = await run_evaluation(http, services, k=[2], strategies=["first"])
    assert len(client.scores) == 6
    cells = {cell["method"]: cell for cell in evaluation["cells"]}
    assert list(cells) == ["nearest_mean", "knn", "linear", "in_context", "blend"]
    correct = {method: cell["correct"] for method, cell in cells.items()}
    assert correct == {"nearest_mean": 5, "knn": 5, "linear": 5, "in_context": 6, "blend": 5}
    assert cells["nearest_mean"]["confusion"] == {"warm": {"warm": 3}, "cold": {"cold": 2, "warm": 1}}
    knn = cells["knn"]
    assert (knn["k"], knn["cost"]["prompt_tokens"], knn["latency"]["queries"]) == (None, 0, 0)
    assert cells["blend"]["cost"] == cells["in_context"]["cost"]
    assert evaluation["progress"] == {
        "cells": 5,
        "cells_done": 5,
        "queries": 30,
        "queries_done": 30,
        "seconds_left": None,
    }


async def test_a_recommended_method_without_a_prompt_can_be_sent_unchanged(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    client.logprobs = constant_share(0.2)
    client.vectors = vectors_by_label()
    recommended = (await run_evaluation(http, services, k=[2]))["recommendation"]["request"]
    body = {**recommended, "query": {"image": MEDIA["red"].id}}
    response = await http.post("/v1/classify", json=body)
    assert recommended["examples"] == {"support_set": recommended["examples"]["support_set"], "version": 1}
    assert (response.status_code, response.json()["label"]) == (200, "warm")
    assert response.json()["method"] == recommended["method"] in ("nearest_mean", "knn", "linear")


async def test_an_evaluation_waits_for_an_unavailable_engine(
    http: httpx.AsyncClient, client: FakeClient, services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="server.quality")
    refusals = 3

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise EngineNotReady("restarting")
        return logprobs_of(0.7, request, candidate)

    client.logprobs = logprobs
    evaluation = await run_evaluation(http, services, k=[1], strategies=["first"], methods=["in_context"])
    assert (evaluation["status"], evaluation["cells"][0]["accuracy"], refusals) == ("completed", 1.0, 0)
    assert caplog.messages.count("an evaluation waits because of a temporary error") == 1


async def test_next_to_a_client_one_query_runs_at_a_time(
    http: httpx.AsyncClient, client: FakeClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, most, num_running = client.score, 0, 0

    async def counted(*arguments: Any) -> Any:
        nonlocal most, num_running
        num_running += 1
        most = max(most, num_running)
        await asyncio.sleep(0)
        scored = await score(*arguments)
        num_running -= 1
        return scored

    monkeypatch.setattr(client, "score", counted)
    monkeypatch.setattr(background, "REST", 0.0)
    with services.admission.ticket("client") as ticket:
        ticket.wait()
        evaluation = await run_evaluation(http, services, k=[1], strategies=["first"], methods=["in_context"])
    assert (evaluation["status"], len(client.scores), most) == ("completed", 6, 1)


async def test_an_error_fails_only_its_cell(http: httpx.AsyncClient, client: FakeClient, services: Services) -> None:
    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        if len(request.prompt.media) > 2:
            raise InvalidMedia("broken image")
        return logprobs_of(0.7, request, candidate)

    client.logprobs = logprobs
    evaluation = await run_evaluation(http, services, k=[1, 2], strategies=["first"], methods=["in_context", "blend"])
    assert evaluation["status"] == "completed"
    statuses = [(cell["method"], cell["k"], cell["status"]) for cell in evaluation["cells"]]
    assert statuses == [
        ("in_context", 1, "completed"),
        ("blend", 1, "completed"),
        ("in_context", 2, "failed"),
        ("blend", 2, "failed"),
    ]
    assert evaluation["cells"][3]["error"] == {"code": "invalid_media", "message": "broken image"}
    assert evaluation["recommendation"]["request"]["examples"]["k"] == 1


async def test_an_evaluation_fails_if_all_of_its_cells_do(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        raise InvalidMedia(f"broken image among {len(request.prompt.media)}")

    client.logprobs = logprobs
    evaluation = await run_evaluation(http, services, k=[1, 2], strategies=["first"], methods=["in_context"])
    assert evaluation["status"] == "failed"
    assert evaluation["error"] == {"code": "invalid_media", "message": "broken image among 2"}
    assert evaluation["progress"]["cells_done"] == 2
    assert (evaluation["recommendation"], evaluation["note"]) == (None, None)


class Gate:
    """Passes the first `num_free` scores and holds all others until `opened` is set."""

    def __init__(self, client: FakeClient, num_free: int) -> None:
        self.opened = asyncio.Event()
        self.num_free = num_free
        self._score = client.score
        client.score = self.score  # type: ignore[method-assign]

    async def score(self, request: Score, media: Any) -> Any:
        self.num_free -= 1
        if self.num_free < 0:
            await self.opened.wait()
        return await self._score(request, media)


async def test_finished_cells_survive_a_restart(
    http: httpx.AsyncClient, client: FakeClient, services: Services, settings: Settings
) -> None:
    client.logprobs = constant_share(0.8)
    gate = Gate(client, num_free=6 + 3)
    async with running(services):
        created = await evaluate(http, k=[1, 2], strategies=["first"], methods=["in_context"])
        await eventually(lambda: len(client.scores) == 9)
        await eventually(lambda: gate.num_free < 0)
    stopped = await read(http, created["id"])
    assert (stopped["status"], stopped["progress"]["cells_done"]) == ("running", 1)
    second_client = FakeClient()
    second_client.logprobs = constant_share(0.8)
    app = create_app(second_client, served_model(), settings, Metrics("tiny"))
    async with running(app.state.services):
        evaluation = await wait_until_ended(http, created["id"])
    await app.state.services.decoder.stop()
    assert evaluation["status"] == "completed"
    assert [cell["k"] for cell in evaluation["cells"]] == [1, 2]
    assert len(second_client.scores) == 6  # only the second cell


async def test_another_server_claims_an_evaluation_after_the_lease_expires(
    http: httpx.AsyncClient, client: FakeClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = await evaluate(http, k=[1], strategies=["first"])
    assert await services.evaluations.claim("the first server") is not None
    assert await services.evaluations.claim("another") is None
    now = time.time()
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + LEASE_SECONDS + 1)
        claimed = await services.evaluations.claim("another")
    assert claimed is not None
    assert claimed.id == created["id"]
    # the first server lives and notices that it has lost the lease
    assert not await services.evaluations.renew(created["id"], "the first server", 3)
    assert not await services.evaluations.finish_cell(created["id"], "the first server", 0, {}, 3)
    assert await services.evaluations.renew(created["id"], "another", 0)


async def test_a_cancelled_evaluation_stops(http: httpx.AsyncClient, client: FakeClient, services: Services) -> None:
    Gate(client, num_free=2)
    async with running(services):
        created = await evaluate(http, k=[1], strategies=["first"], methods=["in_context"])
        await eventually(lambda: len(client.scores) == 2)
        cancelled = await http.post(f"/v1/evaluations/{created['id']}/cancel")
        assert cancelled.json()["status"] == "cancelled"
        other = await evaluate(http, k=[0], strategies=["first"], max_queries=1)
        # the other evaluation begins only when the runner has left the first one
        async with asyncio.timeout(20):
            while (await read(http, other["id"]))["status"] == "queued":
                await asyncio.sleep(0.01)
    assert (await read(http, created["id"]))["status"] == "cancelled"
    assert (await read(http, created["id"]))["cells"] == []


async def test_a_deleted_support_set_fails_its_evaluation(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    created = await evaluate(http, k=[1], strategies=["first"])
    await services.support_sets.delete("colours")
    async with running(services):
        evaluation = await wait_until_ended(http, created["id"])
    assert (evaluation["status"], evaluation["error"]["code"]) == ("failed", "support_set_not_found")


async def test_a_support_set_that_is_deleted_meanwhile_fails_its_evaluation(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    gate = Gate(client, num_free=3)
    async with running(services):
        created = await evaluate(http, k=[1], strategies=["first"], methods=["in_context", "nearest_mean"])
        await eventually(lambda: gate.num_free < 0)
        await services.support_sets.delete("colours")
        gate.opened.set()
        evaluation = await wait_until_ended(http, created["id"])
    assert [cell["method"] for cell in evaluation["cells"]] == ["nearest_mean"]
    assert (evaluation["status"], evaluation["error"]["code"]) == ("failed", "support_set_not_found")


async def test_a_bug_fails_only_its_evaluation(http: httpx.AsyncClient, client: FakeClient, services: Services) -> None:
    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        if len(request.prompt.media) == 2:
            raise ZeroDivisionError
        return logprobs_of(0.7, request, candidate)

    client.logprobs = logprobs
    async with running(services):
        first, second = [await evaluate(http, k=[k], strategies=["first"]) for k in (1, 2)]
        error = (await wait_until_ended(http, first["id"]))["error"]
        assert error == {"code": "internal_error", "message": "internal error"}
        assert (await wait_until_ended(http, second["id"]))["status"] == "completed"
