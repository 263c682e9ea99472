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
from server.media.source import encoded
from server.settings import Settings
from server.store import database
from server.store.records import NewExample, SupportSet
from server.store.support_sets import SupportSets
from server.wire import Event, Generate
from tests.server.access.conftest import EXAMPLES, SETS, create
from tests.server.conftest import png
from tests.server.fakes import FakeClient, eventually

pytestmark = pytest.mark.anyio

ACME, OTHER = add_salt(b"", "tenant", "acme"), add_salt(b"", "tenant", "other")


def hold_streams(
    client: FakeClient, resume: asyncio.Event, monkeypatch: pytest.MonkeyPatch, digest: bytes | None = None
) -> list[Generate]:
    """Make requests wait for an event, those with a media item or else all; return the list of those that wait."""
    stream, waiting = client.stream, list[Generate]()

    def held(request: Generate, media: Any) -> AsyncIterator[Event]:
        async def events() -> AsyncIterator[Event]:
            if digest is None or digest in media:
                waiting.append(request)
                await resume.wait()
            async for event in stream(request, media):
                yield event

        return events()

    monkeypatch.setattr(client, "stream", held)
    return waiting


async def test_pinned_sets_of_all_tenants_are_kept_warm(
    app: FastAPI, maintenance: Maintenance, acme: httpx.AsyncClient, other: httpx.AsyncClient, client: FakeClient
) -> None:
    tenants = app.state.tenants
    await create(acme, "s", pinned=True)
    await create(other, "s", pinned=True, examples=EXAMPLES[:1])
    await asyncio.gather(*await maintenance.run_once())
    assert {tenant: len(tenants.of(tenant).engine.pinned) for tenant in ("acme", "other")} == {"acme": 4, "other": 1}
    assert set(client.salts) == {ACME, OTHER}
    await asyncio.gather(*await maintenance.run_once())
    metrics = (await acme.get("/metrics")).text
    assert 'flamboyance:support_sets{model_name="tiny",status="ready"} 2.0' in metrics
    client.info["pid"] = "a new worker"
    await acme.delete(f"{SETS}/s")
    for _ in range(2):  # the second counts what the first has warmed
        await asyncio.gather(*await maintenance.run_once())
    assert {tenant: len(tenants.of(tenant).engine.pinned) for tenant in ("acme", "other")} == {"acme": 4, "other": 1}
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
    engine_of_acme = tenants.of("acme").engine
    hold_streams(engine_of_acme, resume, monkeypatch)
    warming = await maintenance.run_once()
    await eventually(lambda: len(tenants.of("other").engine.pinned) == 1)
    (unfinished,) = [task for task in warming if not task.done()]
    assert unfinished in await maintenance.run_once()
    metrics = (await acme.get("/metrics")).text
    for status in ("warming", "ready"):
        assert f'flamboyance:support_sets{{model_name="tiny",status="{status}"}} 1.0' in metrics
    resume.set()
    await asyncio.gather(*warming)
    assert len(engine_of_acme.pinned) == 4


async def test_room_that_a_tenant_leaves_is_for_all(
    app: FastAPI, maintenance: Maintenance, acme: httpx.AsyncClient, other: httpx.AsyncClient
) -> None:
    await create(acme, "s", pinned=True)
    await create(other, "s", pinned=True, examples=EXAMPLES[:1])
    await asyncio.gather(*await maintenance.run_once())
    worker = app.state.tenants.of("other").engine
    worker.pinned = set()  # as if it had had no room
    await acme.delete(f"{SETS}/s")
    await asyncio.gather(*await maintenance.run_once())
    assert len(worker.pinned) == 1


async def test_more_tenants_than_transactions_may_wait_are_kept_warm(
    app: FastAPI, maintenance: Maintenance, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their versions are read a few at a time, and once per worker."""
    names = [f"tenant-{index}" for index in range(32)]
    example = NewExample(id="a", media=(encoded(png("red"), "image", ""),), label="red", question="")
    tenants = [app.state.tenants.of(name) for name in names]
    for tenant in tenants:
        await tenant.support_sets.create("s", [example], is_pinned=True)
    num_reads, get_version = 0, SupportSets.get_version

    async def counted(self: SupportSets, set_id: str, version: int) -> SupportSet:
        nonlocal num_reads
        num_reads += 1
        return await get_version(self, set_id, version)

    monkeypatch.setattr(SupportSets, "get_version", counted)
    monkeypatch.setattr(database, "MAX_TRANSACTIONS", 16)
    for worker in (1, 2):
        client.info["pid"] = worker
        for tenant in tenants:
            tenant.engine.pinned = set()
        for _ in range(2):
            await asyncio.gather(*await maintenance.run_once())
        assert [len(tenant.engine.pinned) for tenant in tenants] == [1] * len(tenants)
        assert num_reads == worker * len(tenants)


class TestSharedCaches:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"share_caches": True})

    async def test_media_stay_pinned_while_the_next_set_is_warmed(
        self,
        maintenance: Maintenance,
        acme: httpx.AsyncClient,
        other: httpx.AsyncClient,
        client: FakeClient,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        shared, held = (encoded(png(colour), "image", "").digest for colour in ("red", "darkred"))
        await create(acme, "s", pinned=True, examples=EXAMPLES[:1])
        await asyncio.gather(*await maintenance.run_once())
        resume = asyncio.Event()
        waiting = hold_streams(client, resume, monkeypatch, held)
        await create(other, "same", pinned=True, examples=EXAMPLES[:1])
        await create(other, "next", pinned=True, examples=EXAMPLES[1:2])
        warming = await maintenance.run_once()
        await eventually(lambda: bool(waiting))
        await acme.delete(f"{SETS}/s")
        await asyncio.gather(*set(await maintenance.run_once()).difference(warming))
        resume.set()
        await asyncio.gather(*warming)
        assert client.pinned == {shared, held}

    async def test_shots_of_another_tenant_stay_pinned(
        self, maintenance: Maintenance, acme: httpx.AsyncClient, other: httpx.AsyncClient, client: FakeClient
    ) -> None:
        shots = {"wait": True, "template": "classification", "shots_attend": "alone"}
        for http in (acme, other):
            await create(http, pinned=True, examples=EXAMPLES[:1])
            assert (await http.post(f"{SETS}/s/warm", json=shots)).status_code == 200
        await asyncio.gather(*await maintenance.run_once())
        (prompt,) = client.pinned_prompts
        for http, left in ((acme, [prompt]), (other, [])):
            await http.delete(f"{SETS}/s")
            await asyncio.gather(*await maintenance.run_once())
            assert client.pinned_prompts == left
