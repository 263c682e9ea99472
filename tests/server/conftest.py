"""The HTTP side in front of a client that tells a story: no worker, no weights."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from server.app import create_app
from server.metrics import Metrics
from server.settings import Settings
from tests.server.fakes import FakeClient, served_model


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        max_num_queued=4,
        max_body_mb=0.25,
        max_media_mb=0.125,
        max_media_per_request=3,
        keep_alive=0.05,
    )


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def app(client: FakeClient, settings: Settings) -> FastAPI:
    return create_app(client, served_model(), settings, Metrics("tiny"))


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client
    await app.state.services.decoder.stop()
    app.state.services.support_sets.database.close()


def picture(colour: str = "red", size: tuple[int, int] = (20, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes | None = None) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_url(picture() if data is None else data)}}
