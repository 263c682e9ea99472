"""Every route by every role."""

from __future__ import annotations

import logging

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.access.roles import INFERENCE, MANAGE, ROLES, Role, may, needed_role
from server.api.guard import OPEN_PATHS, is_playground
from server.app import ROUTERS
from server.settings import Settings

pytestmark = pytest.mark.anyio

ADMIN = {("POST", "/v1/keys"), ("GET", "/v1/keys"), ("DELETE", "/v1/keys/{key_id}")}
ROUTES = [
    (method, route.path)
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods or ())
]


def test_every_route_has_a_role() -> None:
    """A new route fails here until its role is decided."""
    known = INFERENCE | MANAGE | ADMIN
    assert {*ROUTES} == known
    assert not INFERENCE & MANAGE


def test_a_route_that_has_no_role_is_for_administrators() -> None:
    assert needed_role("POST", "/v1/unheard_of") == "admin"
    assert {needed_role(method, path) for method, path in ADMIN} == {"admin"}


def test_reading_never_needs_more_than_inference() -> None:
    reading = {(method, path) for method, path in ROUTES if method == "GET" and path != "/v1/keys"}
    assert reading <= INFERENCE


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_route_by_a_role(app: FastAPI, http: httpx.AsyncClient, method: str, path: str, role: Role) -> None:
    _, secret = await app.state.services.keys.create("test", role)
    address = path.replace("{name:path}", "tiny").replace("{file:path}", "x").replace("{", "").replace("}", "")
    response = await http.request(method, address, headers={"Authorization": f"Bearer {secret}"})
    is_refused = response.status_code == 403
    assert is_refused == (not may(role, needed_role(method, path)))
    if is_refused:
        assert response.json()["error"]["code"] == "permission_denied"
        assert needed_role(method, path) in response.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_route_without_a_key(app: FastAPI, http: httpx.AsyncClient, method: str, path: str) -> None:
    await app.state.services.keys.create("test", "inference")
    address = path.replace("{name:path}", "tiny").replace("{file:path}", "x").replace("{", "").replace("}", "")
    is_open = path in OPEN_PATHS or is_playground(path) or address == "/docs/asset"
    response = await http.request(method, address)
    assert (response.status_code == 401) == (not is_open or address == "/docs/asset")


async def test_the_log_says_who_changed_what(
    app: FastAPI, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    key, secret = await app.state.services.keys.create("test", "manage", tenant="acme")
    headers = {"Authorization": f"Bearer {secret}", "X-Request-Id": "change"}
    caplog.set_level(logging.INFO, "server.api.guard")
    for method, path, status in (
        ("POST", "/v1/support_sets", 200),
        ("GET", "/v1/support_sets/birds", 200),
        ("DELETE", "/v1/support_sets/birds", 200),
        ("DELETE", "/v1/support_sets/birds", 404),
        ("DELETE", "/v1/support_sets/bi%0ards", 404),
    ):
        body = {"name": "birds", "examples": []} if method == "POST" else None
        assert (await http.request(method, path, json=body, headers=headers)).status_code == status
    lines = [record for record in caplog.records if record.message == "management request"]
    assert [[line.__dict__[name] for name in ("method", "path", "status")] for line in lines] == [
        ["POST", "/v1/support_sets", 200],
        ["DELETE", "/v1/support_sets/birds", 200],
        ["DELETE", "/v1/support_sets/birds", 404],
        ["DELETE", "/v1/support_sets/bi%0Ards", 404],
    ]
    for line in lines:
        assert [line.__dict__[name] for name in ("request_id", "tenant", "by")] == ["change", "acme", key.id]


class TestGuardedMetrics:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"guard_metrics": True})

    async def test_metrics_need_a_key(self, app: FastAPI, http: httpx.AsyncClient) -> None:
        _, secret = await app.state.services.keys.create("scraper", "inference")
        assert (await http.get("/metrics")).status_code == 401
        assert (await http.get("/health/live")).status_code == 200
        assert (await http.get("/metrics", headers={"Authorization": f"Bearer {secret}"})).status_code == 200
