"""The guard checks the API key, and every response has a request id."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from server.api.guard import OPEN_PATHS
from server.settings import Settings

pytestmark = pytest.mark.anyio
KEY = "correct horse"
PROTECTED_PATHS = [
    "/health",
    "/health/progress",
    "/version",
    "/v1/models",
    "/v1/models/tiny",
    "/docs/",
    "/docs/docs.html",
    "/openapi.yaml",
    "/redoc",
    "/nowhere",
]


class TestWithKey:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(api_key=KEY)

    @pytest.mark.parametrize("path", PROTECTED_PATHS)
    @pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {KEY}", KEY, "Bearer", f"Bearer {KEY}x"])
    async def test_a_wrong_or_missing_key_is_refused(
        self, http: httpx.AsyncClient, path: str, header: str | None
    ) -> None:
        response = await http.get(path, headers={} if header is None else {"Authorization": header})
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]

    async def test_a_body_is_not_read_without_the_key(self, http: httpx.AsyncClient) -> None:
        assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 401

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
    async def test_the_key_is_accepted(self, http: httpx.AsyncClient, scheme: str) -> None:
        headers = {"Authorization": f"{scheme} {KEY}"}
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
        assert (await http.post("/v1/completions", json={"prompt": "x"}, headers=headers)).status_code == 200

    @pytest.mark.parametrize("path", sorted(OPEN_PATHS))
    async def test_probes_and_documentation_need_no_key(self, http: httpx.AsyncClient, path: str) -> None:
        assert (await http.get(path)).status_code == 200


async def test_without_a_configured_key_all_requests_are_accepted(http: httpx.AsyncClient, app: FastAPI) -> None:
    assert (await http.get("/v1/models", headers={"Authorization": "Bearer anything"})).status_code == 200


@pytest.mark.parametrize(("sent", "is_kept"), [("abc-1.2:3", True), ("a b", False), ("x" * 129, False), ("", False)])
async def test_only_a_valid_request_id_is_kept(http: httpx.AsyncClient, sent: str, is_kept: bool) -> None:
    request_id = (await http.get("/v1/models", headers={"X-Request-Id": sent})).headers["x-request-id"]
    assert (request_id == sent) == is_kept
    assert request_id


async def test_unknown_routes_and_methods_have_the_error_shape(http: httpx.AsyncClient) -> None:
    missing, wrong = await http.get("/v2/nothing"), await http.get("/v1/completions")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
