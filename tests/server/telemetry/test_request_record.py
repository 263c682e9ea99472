"""All routes that use the engine record metrics, a log line and `usage` in the same way."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.access.quotas import Limits
from server.errors import EngineDied, EngineNotReady, InvalidRequest, ServerError
from tests.server.conftest import data_url, image_part, png
from tests.server.fakes import FakeClient

pytestmark = pytest.mark.anyio

RED, BLUE = data_url(png("red")), data_url(png("blue"))
SHOTS = [{"image": RED, "label": "cat"}, {"image": BLUE, "label": "dog"}]
FEW_SHOT = {"shots": SHOTS, "query": {"image": RED}}
PARTS = [image_part(), {"type": "text", "text": "a cat"}]

# a request for every route that uses the engine, and its number of media
REQUESTS: dict[str, tuple[dict[str, Any], int]] = {
    "/v1/completions": ({"prompt": PARTS, "max_tokens": 2}, 1),
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": PARTS}], "max_tokens": 2}, 1),
    "/v1/fewshot/completions": ({**FEW_SHOT, "template": "classification", "max_tokens": 2}, 3),
    "/v1/classify": ({**FEW_SHOT, "method": "blend"}, 3),
    "/v1/decisions": (
        {
            "input": [{"role": "user", "content": [{"type": "input_image", "image_url": RED}]}],
            "questions": [{"type": "predicate", "instructions": "a"}, {"type": "predicate", "instructions": "b"}],
        },
        2,
    ),
    "/v1/score": ({"prompt": PARTS, "candidates": ["a", "b"]}, 1),
    "/v1/embeddings": ({"input": [image_part()]}, 1),
    "/v1/inspect": ({"prompt": PARTS}, 1),
}


def metric(app: FastAPI, name: str) -> float:
    """Return the sum of the samples with this name."""
    lines = app.state.services.metrics.expose().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"flamboyance:{name}{{"))


@pytest.mark.parametrize("route", REQUESTS)
async def test_a_request_is_counted_once(
    http: httpx.AsyncClient, app: FastAPI, route: str, caplog: pytest.LogCaptureFixture
) -> None:
    body, num_media = REQUESTS[route]
    with caplog.at_level(logging.INFO, "server.telemetry.request_record"):
        response = await http.post(route, json=body, headers={"X-Request-Id": "mine"})
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    prompt_tokens = usage["input_tokens" if route == "/v1/decisions" else "prompt_tokens"]
    assert usage["fewshot_details"]["media"] == num_media
    assert metric(app, "request_success_total") == 1
    assert metric(app, "request_media_count") == metric(app, "request_prompt_tokens_count") == 1
    assert metric(app, "request_media_sum") == num_media
    assert metric(app, "request_prompt_tokens_sum") == metric(app, "prompt_tokens_total") == prompt_tokens
    assert metric(app, "e2e_request_latency_seconds_count") == 1
    assert metric(app, "num_requests_waiting") == metric(app, "num_requests_running") == 0
    (line,) = [record for record in caplog.records if record.message == "request finished"]
    fields = vars(line)
    assert (fields["request_id"], fields["path"], fields["media"]) == ("mine", route, num_media)
    assert (fields["prompt_tokens"], fields["finish_reason"]) == (
        prompt_tokens,
        "length" if "max_tokens" in body else "stop",
    )


@pytest.mark.parametrize("route", ["/v1/fewshot/completions", "/v1/classify"])
async def test_shots_are_counted(http: httpx.AsyncClient, app: FastAPI, route: str) -> None:
    assert (await http.post(route, json=REQUESTS[route][0])).status_code == 200
    assert (metric(app, "request_shots_count"), metric(app, "request_shots_sum")) == (1, 2)


async def test_a_search_is_counted(http: httpx.AsyncClient, app: FastAPI) -> None:
    examples = [{"id": "a", "image": RED, "label": "cat"}]
    assert (await http.post("/v1/support_sets", json={"name": "pets", "examples": examples})).status_code == 200
    assert (await http.post("/v1/support_sets/pets/search", json={"query": {"image": BLUE}})).status_code == 200
    assert metric(app, "request_success_total") == metric(app, "request_media_sum") == 1


@pytest.mark.parametrize(
    ("strategy", "query"),
    [("rices_image", {}), ("rices_text", {"image": BLUE}), ("rices_text", {"text": "a cat"}), ("mixed", {"text": "x"})],
)
async def test_a_refused_search_is_not_counted_as_finished(
    http: httpx.AsyncClient, app: FastAPI, strategy: str, query: dict[str, Any]
) -> None:
    """The third query is fine, but the example has no text."""
    examples = [{"id": "a", "image": RED, "label": "cat"}]
    assert (await http.post("/v1/support_sets", json={"name": "pets", "examples": examples})).status_code == 200
    response = await http.post("/v1/support_sets/pets/search", json={"query": query, "strategy": strategy})
    assert response.status_code == 400
    assert metric(app, "request_success_total") == 0
    assert metric(app, "request_refused_total") == 1


async def test_a_request_with_several_prompts_is_counted_once(http: httpx.AsyncClient, app: FastAPI) -> None:
    body = {**FEW_SHOT, "permutations": 2, "calibration": "contextual"}
    usage = (await http.post("/v1/classify", json=body)).json()["usage"]
    assert usage["fewshot_details"]["prompts"] == 4
    assert (metric(app, "request_prompt_tokens_count"), metric(app, "request_queue_time_seconds_count")) == (1, 1)
    assert metric(app, "request_prompt_tokens_sum") == metric(app, "prompt_tokens_total") == usage["prompt_tokens"]


@pytest.mark.parametrize("route", ["/v1/decisions", "/v1/embeddings", "/v1/score", "/v1/inspect"])
async def test_a_failure_of_the_engine_is_counted_as_an_error(
    http: httpx.AsyncClient, app: FastAPI, client: FakeClient, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*arguments: object) -> None:
        raise EngineDied("gone")

    for method in ("embed", "score", "inspect"):
        monkeypatch.setattr(client, method, die)
    assert (await http.post(route, json=REQUESTS[route][0])).status_code == 503
    errors = [
        line for line in app.state.services.metrics.expose().decode().splitlines() if 'finished_reason="error"' in line
    ]
    assert [float(line.rpartition(" ")[2]) for line in errors if "request_success_total" in line] == [1]
    assert metric(app, "request_prompt_tokens_count") == 0


async def test_methods_and_strategies_are_counted(http: httpx.AsyncClient, app: FastAPI) -> None:
    examples = [{"id": name, "image": RED if name == "a" else BLUE, "label": name} for name in "ab"]
    assert (await http.post("/v1/support_sets", json={"name": "pets", "examples": examples})).status_code == 200
    body = {"examples": {"support_set": "pets"}, "query": {"image": BLUE}}
    for fields in ({"method": "nearest_mean"}, {"method": "in_context"}, {"method": "in_context"}):
        answer = await http.post("/v1/classify", json=body | fields)
        assert answer.status_code == 200
    strategy = answer.json()["fewshot"]["strategy"]
    lines = app.state.services.metrics.expose().decode().splitlines()
    assert 'flamboyance:classifications_total{method="nearest_mean",model_name="tiny"} 1.0' in lines
    assert 'flamboyance:classifications_total{method="in_context",model_name="tiny"} 2.0' in lines
    assert 'flamboyance:classifications_total{method="knn",model_name="tiny"} 0.0' in lines
    assert f'flamboyance:selections_total{{model_name="tiny",strategy="{strategy}"}} 2.0' in lines


async def test_the_time_of_an_answer_is_divided_at_its_first_token(http: httpx.AsyncClient, app: FastAPI) -> None:
    assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
    assert metric(app, "request_prefill_time_seconds_count") == metric(app, "request_decode_time_seconds_count") == 1
    # the scripted engine says that it waited for longer than the whole answer took
    assert metric(app, "request_prefill_time_seconds_sum") == 0
    assert 0 < metric(app, "request_decode_time_seconds_sum") < metric(app, "e2e_request_latency_seconds_sum")


@pytest.mark.parametrize("error", [EngineNotReady("the engine is loading"), InvalidRequest("too long")])
async def test_a_refused_request_uses_no_tokens_of_its_key(
    error: ServerError, http: httpx.AsyncClient, client: FakeClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*arguments: Any) -> AsyncIterator[Any]:
        for refusal in [error]:
            raise refusal
        yield

    _, key = await app.state.services.keys.create("k", "inference", Limits(tokens=20))
    headers = {"Authorization": f"Bearer {key}"}
    with monkeypatch.context() as patched:
        patched.setattr(FakeClient, "stream", refuse)
        refused = [await http.post("/v1/completions", json={"prompt": "abcdefgh"}, headers=headers) for _ in range(4)]
    assert {response.status_code for response in refused} == {error.status}
    answered = [await http.post("/v1/completions", json={"prompt": "abcdefgh"}, headers=headers) for _ in range(4)]
    assert [response.status_code for response in (answered[0], answered[-1])] == [200, 429]
