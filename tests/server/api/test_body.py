"""The size limit applies while a body arrives, and a body must arrive in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from server.schemas.base import MAX_SEPARATORS
from server.settings import Settings
from tests.server.fakes import FakeClient

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
    response = await http.post("/v1/completions", content=body + b" " * (LIMIT - len(body)))
    assert response.status_code == 200


class TestManyValues:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_body_mb": 8})

    @pytest.mark.parametrize("separator", MAX_SEPARATORS)
    async def test_a_body_of_more_values_than_any_request_needs_is_refused_unparsed(
        self, http: httpx.AsyncClient, separator: bytes
    ) -> None:
        body = b'{"prompt": ' + separator * (MAX_SEPARATORS[separator] + 1)
        response = await http.post("/v1/completions", content=body)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


class TestSlowBody:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(body_timeout=0.1)

    async def test_a_body_that_arrives_too_slowly_is_refused(self, http: httpx.AsyncClient, app: FastAPI) -> None:
        response = await http.post("/v1/completions", content=pieces(100, 1, [], pause=0.05))
        assert (response.status_code, response.json()["error"]["code"]) == (408, "body_timeout")
        assert app.state.services.admission.num_waiting == 0
