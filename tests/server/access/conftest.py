"""Clients with keys of several tenants, and the background task that serves all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.access.quotas import Limits
from server.access.roles import Role
from server.fewshot.maintenance import Maintenance
from tests.server.conftest import image_part, png
from tests.server.documented import CHECKED
from tests.server.fakes import FakeClient

SETS = "/v1/support_sets"
EXAMPLES = [
    {"id": "a", "label": "red", "media": [image_part(png("red"))]},
    {"id": "b", "label": "red", "media": [image_part(png("darkred"))]},
    {"id": "c", "label": "blue", "media": [image_part(png("blue"))]},
    {"id": "d", "label": "blue", "media": [image_part(png("navy"))]},
]


class Keyring:
    """Makes clients of the application, each with a new key."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._open: list[httpx.AsyncClient] = []

    async def client(self, tenant: str, role: Role = "manage", limits: Limits | None = None) -> httpx.AsyncClient:
        _, secret = await self._app.state.services.keys.create("test", role, limits, tenant=tenant)
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self._app, raise_app_exceptions=False),
            base_url="http://localhost",
            event_hooks=CHECKED,
            headers={"Authorization": f"Bearer {secret}"},
        )
        self._open.append(client)
        return client

    async def close(self) -> None:
        for client in self._open:
            await client.aclose()


async def create(http: httpx.AsyncClient, name: str | None = "s", **fields: Any) -> dict[str, Any]:
    response = await http.post(SETS, json={"name": name, "examples": EXAMPLES, **fields})
    assert response.status_code == 200, response.text
    created: dict[str, Any] = response.json()
    return created


@pytest.fixture
async def keyring(app: FastAPI, http: httpx.AsyncClient) -> AsyncIterator[Keyring]:
    keyring = Keyring(app)
    yield keyring
    await keyring.close()


@pytest.fixture
async def acme(keyring: Keyring) -> httpx.AsyncClient:
    return await keyring.client("acme")


@pytest.fixture
async def other(keyring: Keyring) -> httpx.AsyncClient:
    return await keyring.client("other")


@pytest.fixture
def maintenance(app: FastAPI, client: FakeClient) -> Maintenance:
    services = app.state.services
    return Maintenance(
        services.support_sets,
        (services.support_sets.sweep, services.retrieval.embeddings.sweep),
        app.state.tenants.warm_sets,
        client,
        services.metrics,
        sweep_interval=3600,
    )
