"""A server with the support set `colours`, for the tests of evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI

from server.api.services import Services
from server.settings import Settings
from tests.server.evaluations import EXAMPLES


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_media_per_request=6)


@pytest.fixture
async def services(app: FastAPI) -> Services:
    services: Services = app.state.services
    await services.support_sets.create("colours", EXAMPLES)
    return services
