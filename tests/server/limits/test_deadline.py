"""A deadline covers the body, the queue, media and tokens; past it the work stops, and the response is an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from server.limits.deadline import HEADER, Deadline
from server.settings import Settings
from tests.server.conftest import data_url, image_part, png
from tests.server.documented import CHECKED
from tests.server.fakes import FakeClient, eventually

pytestmark = pytest.mark.anyio
SOON = {HEADER: "0.1"}


@pytest.fixture
def stuck(client: FakeClient) -> FakeClient:
    """A client whose engine makes two tokens and then no more."""

    async def before(index: int) -> None:
        if index >= 2:
            await asyncio.Event().wait()

    client.before = before
    return client


def assert_exceeded(response: httpx.Response) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    "sent",
    [
        {"headers": SOON},
        {"timeout": 0.1},
        {"headers": SOON, "timeout": 100},
        {"headers": {HEADER: "99"}, "timeout": 0.1},
    ],
)
async def test_a_request_past_its_deadline_ends_and_its_work_is_aborted(
    http: httpx.AsyncClient, app: FastAPI, stuck: FakeClient, sent: dict[str, object]
) -> None:
    body = {"prompt": "x", **{name: value for name, value in sent.items() if name == "timeout"}}
    assert_exceeded(await http.post("/v1/completions", json=body, headers=sent.get("headers", {})))  # type: ignore[arg-type]
    assert len(stuck.aborted) == 1
    await asyncio.wait_for(app.state.services.admission.wait_until_empty(), 5)


async def test_a_stream_keeps_what_was_made_and_ends_with_an_error_event(
    http: httpx.AsyncClient, stuck: FakeClient
) -> None:
    response = await http.post("/v1/completions", json={"prompt": "x", "stream": True, "timeout": 0.3})
    assert response.status_code == 200
    events = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert len(events) == 4
    assert '"code":"deadline_exceeded"' in events[-2]
    assert events[-1] == "data: [DONE]"
    assert len(stuck.aborted) == 1


class TestSilentStream:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"keep_alive": 60.0})

    async def test_a_stream_that_has_not_begun_is_refused_with_its_status(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        async def before(index: int) -> None:
            await asyncio.Event().wait()

        client.before = before
        assert_exceeded(await http.post("/v1/completions", json={"prompt": "x", "stream": True, "timeout": 0.1}))


async def test_a_deadline_covers_a_body_that_arrives_slowly(http: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    assert_exceeded(await http.post("/v1/completions", content=body(), headers=SOON))


async def test_a_deadline_covers_media(http: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read_all(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(type(app.state.services.intake), "read_all", read_all)
    assert_exceeded(await http.post("/v1/completions", json={"prompt": [image_part()], "timeout": 0.1}))


@pytest.mark.parametrize("route", ["/v1/classify", "/v1/decisions", "/v1/score", "/v1/inspect", "/v1/embeddings"])
async def test_every_route_of_the_engine_has_deadlines(http: httpx.AsyncClient, app: FastAPI, route: str) -> None:
    async def before(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    for name in ("score", "inspect", "embed", "embed_text"):
        setattr(app.state.services.engine, name, before)
    shots = [{"image": data_url(png()), "label": label} for label in ("a", "b")]
    bodies: dict[str, dict[str, object]] = {
        "/v1/classify": {"shots": shots, "query": {"image": data_url(png())}},
        "/v1/decisions": {"input": "x", "questions": [{"type": "predicate", "instructions": "a"}]},
        "/v1/score": {"prompt": "x", "candidates": ["a", "b"]},
        "/v1/inspect": {"prompt": [image_part(), {"type": "text", "text": "x"}]},
        "/v1/embeddings": {"input": "x"},
    }
    assert_exceeded(await http.post(route, json={**bodies[route], "timeout": 0.1}))


class TestServersLimit:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"request_timeout": 0.1})

    async def test_it_holds_for_requests_that_ask_for_more(self, http: httpx.AsyncClient, stuck: FakeClient) -> None:
        assert_exceeded(await http.post("/v1/completions", json={"prompt": "x"}))
        assert_exceeded(await http.post("/v1/completions", json={"prompt": "x", "timeout": 100}))


@pytest.mark.parametrize("value", ["", "abc", "0", "-1", "nan", "inf", "1e9", "1s", "1_0"])
async def test_a_header_that_is_no_number_of_seconds_is_refused_by_name(http: httpx.AsyncClient, value: str) -> None:
    response = await http.post("/v1/completions", json={"prompt": "x"}, headers={HEADER: value})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, HEADER, "invalid_value")


@pytest.mark.parametrize("value", [0, -1, 1e9, "1", None])
async def test_the_field_has_the_same_range(http: httpx.AsyncClient, value: object) -> None:
    response = await http.post("/v1/completions", json={"prompt": "x", "timeout": value})
    assert response.status_code == (200 if value is None else 400)


async def test_a_request_within_its_deadline_is_served(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={"prompt": "x", "timeout": 60}, headers={HEADER: "60"})
    assert response.status_code == 200


async def test_a_client_that_leaves_before_its_deadline_aborts_the_work(app: FastAPI, stuck: FakeClient) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", event_hooks=CHECKED) as http:
        post = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x", "timeout": 60}))
        await eventually(lambda: bool(stuck.requests))
        post.cancel()
        await asyncio.wait({post})
    await eventually(lambda: bool(stuck.aborted))


async def test_a_limit_that_was_ended_cancels_nothing() -> None:
    deadline = Deadline(0.05)
    async with deadline.limit():
        deadline.end()
        await asyncio.sleep(0.1)
