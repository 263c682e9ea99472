"""A stand-in hub per test, to which huggingface_hub's settings point, and the tiny repositories that it publishes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from model.hub import prepare as prepare_module
from model.hub.convert import convert
from model.hub.job import Job
from tests.model.hub import stand_in
from tests.model.hub.repositories import write_idefics, write_openflamingo
from tests.model.hub.stand_in import StandIn


@pytest.fixture(scope="session")
def server() -> Iterator[StandIn]:
    with stand_in.running() as hub:
        yield hub


@pytest.fixture
def hub(server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """An empty hub; this process and those that it starts use it, with an empty cache and without a token."""
    server.reset()
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"),
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    huggingface_hub.close_session()


@pytest.fixture(scope="session")
def openflamingo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the repositories of all OpenFlamingo models and their experts, by name."""
    return write_openflamingo(tmp_path_factory.mktemp("openflamingo"))


@pytest.fixture(scope="session")
def idefics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idefics(tmp_path_factory.mktemp("idefics"))


def in_this_process(job: Job) -> None:
    """Replace the process of an import, which takes seconds to load torch."""
    convert(job)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of model folders; imports run in this process."""
    monkeypatch.setattr(prepare_module, "_run", in_this_process)
    return tmp_path / "cache"


@pytest.fixture
def published(hub: StandIn, openflamingo: dict[str, Path]) -> StandIn:
    """A hub with all OpenFlamingo models and their experts."""
    for name, folder in openflamingo.items():
        hub.publish(name, folder)
    return hub
