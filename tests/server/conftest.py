"""Fixtures for the HTTP side with a scripted client (no worker, no weights), and for SQLite and PostgreSQL databases."""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest
from fastapi import FastAPI
from PIL import Image

from bench.postgresql import postgresql
from model.folder import save_folder
from server.app import create_app
from server.media.store import MediaStore
from server.settings import Settings
from server.store.database import Database
from server.store.media_references import MediaReferences
from server.store.support_sets import SupportSets
from server.telemetry.metrics import Metrics
from tests.server.documented import CHECKED
from tests.server.fakes import CONFIG, FakeClient, served_model
from tests.tiny_models import byte_tokenizer, tiny_model


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with random weights; no test changes it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(folder, CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        max_num_queued=4,
        max_body_mb=0.25,
        max_media_mb=0.125,
        max_import_mb=2,
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
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", event_hooks=CHECKED) as client:
        yield client
    await app.state.services.decoder.stop()
    app.state.services.database.close()


def png(colour: str = "red", size: tuple[int, int] = (20, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes | None = None) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_url(png() if data is None else data)}}


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    with postgresql() as url:
        yield url


@contextmanager
def _fresh_schema(server: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
        yield f"{server}&options=-csearch_path%3D{name}"
        connection.execute(f"DROP SCHEMA {name} CASCADE")


@pytest.fixture
def another_schema(postgresql_url: str) -> Iterator[str]:
    """An empty PostgreSQL database next to that of `database_url`."""
    with _fresh_schema(postgresql_url) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'data' / 'test.db'}"
        return
    with _fresh_schema(request.getfixturevalue("postgresql_url")) as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(str(tmp_path / "media"))


@pytest.fixture
def media_references(database: Database, store: MediaStore) -> MediaReferences:
    return MediaReferences(database, store)


@pytest.fixture
def support_sets(database: Database, media_references: MediaReferences) -> SupportSets:
    return SupportSets(database, media_references, max_examples=20)
