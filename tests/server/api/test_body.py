"""The size limit applies while a body arrives, and a body must arrive in time."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from server.access.callers import Caller
from server.api.body import read_query, spool_body
from server.errors import BodyTimeout, BodyTooLarge, UnsupportedParameter
from server.schemas import separators
from server.schemas.base import Schema
from server.schemas.separators import MAX_SEPARATORS
from server.schemas.stored import ListImagesRequest
from server.settings import Settings
from tests.server.fakes import AS_JSON, FakeClient

pytestmark = pytest.mark.anyio
LIMIT = 2**18


async def pieces(count: int, size: int, sent: list[int], pause: float = 0.0) -> AsyncIterator[bytes]:
    for index in range(count):
        sent.append(index)
        yield b" " * size
        await asyncio.sleep(pause)


async def test_a_content_length_above_the_limit_is_refused(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", content=b" " * (LIMIT + 1))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert response.headers["connection"] == "close"


async def test_a_body_of_unknown_length_is_refused_at_the_limit(http: httpx.AsyncClient) -> None:
    sent: list[int] = []
    response = await http.post("/v1/completions", content=pieces(100, 2**16, sent))
    assert response.status_code == 413
    assert len(sent) == 5


async def test_a_body_at_the_limit_is_accepted(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = b'{"prompt": "x"}'
    response = await http.post("/v1/completions", headers=AS_JSON, content=body + b" " * (LIMIT - len(body)))
    assert response.status_code == 200


class TestManyValues:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_body_mb": 8})

    @pytest.mark.parametrize("separator", MAX_SEPARATORS)
    async def test_a_body_of_more_values_than_any_request_needs_is_refused_unparsed(
        self, http: httpx.AsyncClient, separator: bytes
    ) -> None:
        text = b'"":' if separator == b":" else separator
        body = b'{"prompt": ' + text * (MAX_SEPARATORS[separator] + 1)
        response = await http.post("/v1/completions", headers=AS_JSON, content=body)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")

    async def test_a_text_of_more_escapes_than_any_request_needs_is_refused_unparsed(
        self, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(separators, "MAX_ESCAPES", 1000)
        refused = await http.post("/v1/completions", json={"prompt": "\n" * 1001})
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
        assert (await http.post("/v1/completions", json={"prompt": "\n" * 1000})).status_code != 413


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/support_sets", "/v1/support_sets/s/examples"])
async def test_large_bodies_are_parsed_one_at_a_time(
    http: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("server.api.body.SLOW_BODY", 1)
    may_end = threading.Event()
    parsing = asyncio.create_task(app.state.services.parsing.run(may_end.wait, 20))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(http.post(path, json={}))
    done, _ = await asyncio.wait({waiting}, timeout=0.3)
    assert not done
    may_end.set()
    await parsing
    assert (await waiting).status_code < 500


@pytest.mark.parametrize("examples", [[{"text": "a"}] * 5000, [{"text": "\n" * 2**15}] * 2])
async def test_a_body_of_many_names_or_escapes_is_parsed_as_a_large_one(
    http: httpx.AsyncClient, app: FastAPI, examples: list[Any]
) -> None:
    may_end = threading.Event()
    parsing = asyncio.create_task(app.state.services.parsing.run(may_end.wait, 20))
    await asyncio.sleep(0)
    body = {"examples": [*examples, {}]}  # refused as soon as it is parsed
    waiting = asyncio.create_task(http.post("/v1/support_sets", json=body))
    done, _ = await asyncio.wait({waiting}, timeout=1.0)
    assert not done
    may_end.set()
    await parsing
    assert (await waiting).status_code == 400


class TestSlowBody:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(body_timeout=0.1)

    async def test_a_body_that_arrives_too_slowly_is_refused(self, http: httpx.AsyncClient, app: FastAPI) -> None:
        response = await http.post("/v1/completions", content=pieces(100, 1, [], pause=0.05))
        assert (response.status_code, response.json()["error"]["code"]) == (408, "body_timeout")
        assert app.state.services.admission.num_waiting == 0


async def test_a_body_that_is_late_is_refused_even_if_the_time_ends_while_the_disk_is_slow(
    app: FastAPI, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowFile(io.BytesIO):
        def write(self, data: Any) -> int:
            loop.call_soon_threadsafe(is_writing.set)
            assert may_write.wait(20)
            return super().write(data)

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else await loop.create_future()

    loop, is_writing, may_write = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    messages = [{"type": "http.request", "body": b"PK", "more_body": True}]
    caller = Caller(client="test", role="admin")
    state = {"ticket": app.state.services.admission.ticket("test"), "caller": caller}
    scope = {"type": "http", "headers": [], "state": state}
    request = Request(scope, receive)
    monkeypatch.setattr("server.api.body.WRITE_BYTES", 1)
    hasty = settings.model_copy(update={"body_timeout": 0.01, "max_import_mb": settings.max_body_mb})
    spooling = asyncio.create_task(spool_body(request, hasty, SlowFile()))
    await is_writing.wait()
    await asyncio.sleep(hasty.body_timeout)
    may_write.set()
    with pytest.raises(BodyTimeout):
        await spooling


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("completions", {"prompt": "x"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("score", {"prompt": "x", "candidates": ["y"]}),
    ],
)
async def test_a_negative_priority_is_refused_by_name(
    http: httpx.AsyncClient, client: FakeClient, route: str, fields: dict[str, Any]
) -> None:
    response = await http.post(f"/v1/{route}", json={**fields, "priority": -(2**31)})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "priority")
    assert error["message"] == "priority is -2147483648, this server does not accept priorities below 0"
    assert not client.requests
    assert not client.scores


class TestNegativePriorities:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(allow_negative_priority=True)

    async def test_they_are_accepted_where_the_settings_allow_them(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        response = await http.post("/v1/completions", json={"prompt": "x", "priority": -2})
        assert response.status_code == 200
        assert client.requests[0].priority == -2


def test_a_query_is_checked_in_a_time_in_proportion_to_its_names() -> None:
    """A list of all names per name would look at 3 * 10^8 of them, and take seconds."""
    query = "&".join(f"a{index}" for index in range(ListImagesRequest.max_names)).encode()
    request = Request({"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": query})
    with pytest.raises(UnsupportedParameter):
        read_query(ListImagesRequest, request)


class TestType:
    @pytest.mark.parametrize(
        "path", ["/v1/completions", "/v1/support_sets", "/v1/support_sets/x/examples", "/tokenize"]
    )
    @pytest.mark.parametrize("declared", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
    async def test_a_body_that_another_site_could_send_unasked_is_refused(
        self, http: httpx.AsyncClient, path: str, declared: str | None
    ) -> None:
        headers = {} if declared is None else {"Content-Type": declared}
        response = await http.post(path, content=b'{"prompt": "x"}', headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
        assert response.json()["error"]["param"] == "Content-Type"

    @pytest.mark.parametrize("declared", ["application/json", "Application/JSON; charset=utf-8"])
    async def test_json_is_accepted_with_its_parameters(self, http: httpx.AsyncClient, declared: str) -> None:
        response = await http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": declared})
        assert response.status_code == 200


async def test_colons_in_texts_are_no_names(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/embeddings", json={"input": ["10:00:01 12:30:00 " * 4] * 2048 + ["::::" * 4]})
    assert "2048 entries" in response.json()["error"]["message"], "the number of texts is at fault, not their colons"


@pytest.mark.parametrize("colon", [":", " \n:"])
async def test_names_are_counted_with_white_space_after_them(http: httpx.AsyncClient, colon: str) -> None:
    names = {f"a{number}": 1 for number in range(Schema.max_names + 1)}
    body = json.dumps(names, separators=(",", colon))
    error = (await http.post("/v1/completions", headers=AS_JSON, content=body)).json()["error"]
    assert error["message"] == f"the body has more than {Schema.max_names} names of fields"


def test_a_query_with_too_many_names_is_called_so() -> None:
    query = "&".join(f"a{number}=1" for number in range(Schema.max_names + 1)).encode()
    request = Request({"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": query})
    with pytest.raises(BodyTooLarge, match="the query string has more than 16384 names"):
        read_query(ListImagesRequest, request)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/keys"),
        ("GET", "/tokenizer_info"),
        ("POST", "/v1/completions"),
        ("DELETE", "/v1/evaluations/ev_1"),
    ],
)
async def test_a_route_without_query_parameters_refuses_one_by_name(
    http: httpx.AsyncClient, method: str, path: str
) -> None:
    body = {"prompt": "x"} if method == "POST" else None
    response = await http.request(method, f"{path}?limit=1", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (422, "unsupported_parameter", "limit")


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/metrics", "/openapi.json", "/docs/docs.js"])
async def test_a_probe_may_add_query_parameters(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(f"{path}?name=1")).status_code == 200
