"""An engine client whose worker is a real process that runs a scripted engine."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.engine_client.client import WorkerClient
from server.engine_client.spare import Spare
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.engine_client.requests import FakeDecoder


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny")


@pytest.fixture
async def decoder() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
async def engine(
    decoder: FakeDecoder, metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[WorkerClient]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client = WorkerClient(Settings(), decoder, metrics, Spare("tests.server.scripted_engine:build", 30.0))
    await client.start()
    await asyncio.wait_for(client.loaded(), 20)
    yield client
    await client.stop()
