"""Pinned sets of several tenants: each tenant's are kept warm, and none delays those of another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.engine_client.salt import add_salt
from server.fewshot.maintenance import Maintenance
from server.wire import Event, Generate
from tests.server.access.conftest import EXAMPLES, SETS, create
from tests.server.fakes import FakeClient, eventually

pytestmark = pytest.mark.anyio

ACME, OTHER = add_salt(b"", "tenant", "acme"), add_salt(b"", "tenant", "other")


async def test_pinned_sets_of_all_tenants_are_kept_warm(
    app: FastAPI, maintenance: Maintenance, acme: httpx.AsyncClient, other: httpx.AsyncClient, client: FakeClient
) -> None:
    tenants = app.state.tenants
    await create(acme, "s", pinned=True)
    await create(other, "s", pinned=True, examples=EXAMPLES[:1])
    await asyncio.gather(*await maintenance.run_once())
    assert {tenant: len(tenants.of(tenant).client.pinned) for tenant in ("acme", "other")} == {"acme": 4, "other": 1}
    assert set(client.salts) == {ACME, OTHER}
    await asyncio.gather(*await maintenance.run_once())
    metrics = (await acme.get("/metrics")).text
    assert 'flamboyance:support_sets{model_name="tiny",status="ready"} 2.0' in metrics
    client.info["pid"] = "a new worker"
    await acme.delete(f"{SETS}/s")
    for _ in range(2):  # the second counts what the first has warmed
        await asyncio.gather(*await maintenance.run_once())
    assert {tenant: len(tenants.of(tenant).client.pinned) for tenant in ("acme", "other")} == {"acme": 4, "other": 1}
    assert 'flamboyance:support_sets{model_name="tiny",status="ready"} 1.0' in (await acme.get("/metrics")).text


async def test_a_large_set_of_a_tenant_delays_no_other_one(
    app: FastAPI,
    maintenance: Maintenance,
    acme: httpx.AsyncClient,
    other: httpx.AsyncClient,
    client: FakeClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it is warmed, sets of others become ready, and a second round sweeps and counts."""
    tenants, resume = app.state.tenants, asyncio.Event()
    await create(acme, "large", pinned=True)
    await create(other, "small", pinned=True, examples=EXAMPLES[:1])
    client_of_acme = tenants.of("acme").client
    stream = client_of_acme.stream

    def held(request: Generate, media: Any) -> AsyncIterator[Event]:
        async def events() -> AsyncIterator[Event]:
            await resume.wait()
            async for event in stream(request, media):
                yield event

        return events()

    monkeypatch.setattr(client_of_acme, "stream", held)
    warming = await maintenance.run_once()
    await eventually(lambda: len(tenants.of("other").client.pinned) == 1)
    (unfinished,) = [task for task in warming if not task.done()]
    assert unfinished in await maintenance.run_once()
    metrics = (await acme.get("/metrics")).text
    for status in ("warming", "ready"):
        assert f'flamboyance:support_sets{{model_name="tiny",status="{status}"}} 1.0' in metrics
    resume.set()
    await asyncio.gather(*warming)
    assert len(client_of_acme.pinned) == 4


async def test_room_that_a_tenant_leaves_is_for_all(
    app: FastAPI, maintenance: Maintenance, acme: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    await create(acme, "s", pinned=True)
    await create(other, "s", pinned=True, examples=EXAMPLES[:1])
    await asyncio.gather(*await maintenance.run_once())
    worker = app.state.tenants.of("other").client
    worker.pinned = set()  # as if it had had no room
    await acme.delete(f"{SETS}/s")
    await asyncio.gather(*await maintenance.run_once())
    assert len(worker.pinned) == 1
