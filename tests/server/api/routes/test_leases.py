"""Requests that fail leave no leases: an image that no set contains can be deleted."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.errors import VersionConflict
from server.media.source import encoded
from server.store import media_references
from server.store.records import NewExample
from tests.server.conftest import png

pytestmark = pytest.mark.anyio
RED = png("red")
RED_ID = encoded(RED, "image", "").id


async def test_a_refused_request_keeps_no_image(http: httpx.AsyncClient, app: FastAPI) -> None:
    await http.post("/v1/images", content=RED, headers={"Content-Type": "image/png"})
    sets, examples = app.state.services.support_sets, [NewExample(id="a", media=(encoded(RED, "image", "media"),))]
    await sets.create("animals", [])
    with pytest.raises(VersionConflict):
        await sets.put_examples("animals", examples, expected_version=7)
    assert (await http.delete(f"/v1/images/{RED_ID}")).status_code == 200


async def test_an_interrupted_request_keeps_no_image(http: httpx.AsyncClient, app: FastAPI) -> None:
    await http.post("/v1/images", content=RED, headers={"Content-Type": "image/png"})
    references, media = app.state.services.media_references, encoded(RED, "image", "media")
    is_prepared = asyncio.Event()

    async def prepare() -> None:
        is_prepared.set()
        await asyncio.sleep(3600)

    writing = asyncio.create_task(references.write({RED_ID: media}, lambda session, now: None, prepare))
    await is_prepared.wait()
    refused = await http.delete(f"/v1/images/{RED_ID}")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (409, "image_in_use")
    assert "try again when it has ended" in error["message"]
    writing.cancel()
    await asyncio.wait([writing])
    assert (await http.delete(f"/v1/images/{RED_ID}")).status_code == 200


async def test_an_upload_whose_image_is_deleted_before_its_lease_is_decoded_again(
    http: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = (await http.post("/v1/images", content=RED, headers={"Content-Type": "image/png"})).json()
    store = app.state.services.media_store
    is_decoded = store.is_decoded
    deleted: list[str] = []

    def is_decoded_and_deleted(media_id: str) -> bool:
        answer = is_decoded(media_id)
        if not deleted:
            deleted.append(media_id)
            store.delete(media_id)
        return answer

    monkeypatch.setattr(store, "is_decoded", is_decoded_and_deleted)
    again = (await http.post("/v1/images", content=RED, headers={"Content-Type": "image/png"})).json()
    assert deleted == [RED_ID]
    assert (again["width"], again["height"]) == (first["width"], first["height"]) != (None, None)


@pytest.mark.parametrize("num_cancellations", [1, 2])
async def test_a_request_cancelled_while_it_stores_bytes_leaves_no_file(
    num_cancellations: int, app: FastAPI, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = app.state.services
    store, references = services.media_store, services.media_references
    put, begun, may_end, ended = store.put, threading.Event(), threading.Event(), threading.Event()

    def slow_put(*args: Any, **info: Any) -> None:
        begun.set()
        assert may_end.wait(30)
        put(*args, **info)
        ended.set()

    monkeypatch.setattr(store, "put", slow_put)
    writing = asyncio.create_task(references.upload(encoded(RED, "image", "media"), {}))
    assert await asyncio.to_thread(begun.wait, 30)
    for _ in range(num_cancellations):
        writing.cancel()
        await asyncio.wait([writing], timeout=0.3)
    await references.sweep()
    may_end.set()
    await asyncio.wait([writing])
    assert writing.cancelled()
    assert await asyncio.to_thread(ended.wait, 30)
    await references.sweep()
    assert not store.exists(RED_ID)


async def test_a_database_that_hangs_does_not_hold_up_a_refusal(
    http: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    await http.post("/v1/images", content=RED, headers={"Content-Type": "image/png"})
    services = app.state.services
    database, references, responds = services.database, services.media_references, asyncio.Event()
    write = database.write

    async def write_late(transaction: Any) -> Any:
        await responds.wait()
        return await write(transaction)

    async def prepare() -> None:
        monkeypatch.setattr(database, "write", write_late)
        raise VersionConflict("another version")

    monkeypatch.setattr(media_references, "RELEASE_SECONDS", 0.05)
    writing = references.write({RED_ID: encoded(RED, "image", "media")}, lambda session, now: None, prepare)
    with pytest.raises(VersionConflict):
        await asyncio.wait_for(writing, 5)
    monkeypatch.setattr(database, "write", write)
    assert (await http.delete(f"/v1/images/{RED_ID}")).status_code == 409
    responds.set()
    while references._releasing:
        await asyncio.sleep(0.01)
    assert (await http.delete(f"/v1/images/{RED_ID}")).status_code == 200
