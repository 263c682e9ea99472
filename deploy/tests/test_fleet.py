"""The flags of an update decide what it replaces: nothing, the gateways alone, or also the replicas."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.ray.fleet import Fleet, read_fleet
from model.folder import save_folder
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

CONFIG = CONFIGS["openflamingo"]
DATABASE = "postgresql://flamboyance@db.internal/flamboyance"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet") / "model"
    save_folder(folder, CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    return folder


def fleet(folder: Path, *flags: str) -> Fleet:
    return read_fleet(["--database", DATABASE, "--model", str(folder), *flags])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], []),
        (["--replicas", "3"], []),
        (["--routing", "random"], []),
        (["--max-body-mb", "8"], ["gateways"]),
        (["--max-client-share", "1"], ["gateways"]),
        (["--request-timeout", "8"], ["gateways"]),
        (["--share-caches", "true"], ["gateways"]),
        (["--cors-origins", "https://app.example.org"], ["gateways", "replicas"]),
        (["--api-key", "another-key"], ["gateways", "replicas"]),
        (["--database", f"{DATABASE}_2"], ["gateways", "replicas"]),
        (["--generation", "2"], ["gateways", "replicas"]),
    ],
    ids=str,
)
def test_what_an_update_replaces(folder: Path, flags: list[str], expected: list[str]) -> None:
    old, new = fleet(folder), fleet(folder, *flags)
    versions = {
        "gateways": (old.gateway_version, new.gateway_version),
        "replicas": (old.version, new.version),
    }
    assert [name for name, (before, after) in versions.items() if before != after] == expected


def test_a_larger_fleet_lets_more_requests_wait_in_its_running_gateways(folder: Path) -> None:
    small, large = [fleet(folder, "--replicas", number, "--max-num-queued", "8") for number in ("2", "2-6")]
    assert (small.gateway_config["max_waiting"], large.gateway_config["max_waiting"]) == (16, 48)
