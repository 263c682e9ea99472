"""Requests that fail leave no leases: an image that no set contains can be deleted."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from server.errors import VersionConflict
from server.media.source import encoded
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
    assert "an unfinished request" in error["message"]
    writing.cancel()
    await asyncio.wait([writing])
    assert (await http.delete(f"/v1/images/{RED_ID}")).status_code == 200
