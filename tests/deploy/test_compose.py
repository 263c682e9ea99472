"""Tests that every path, target, port and variable in the compose files and the Prometheus configuration exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from server.api.guard import OPEN_PATHS
from server.settings import PREFIX, Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))
    return values


COMPOSE, CUDA, PROMETHEUS = read("compose.yaml"), read("compose.cuda.yaml"), read("prometheus/prometheus.yml")


@pytest.mark.parametrize(("file", "target"), [(COMPOSE, "cpu"), (CUDA, "cuda")], ids=["cpu", "cuda"])
def test_each_compose_file_builds_its_target(file: dict[str, Any], target: str) -> None:
    server = file["services"]["server"]
    assert server["build"]["target"] == target
    assert server["image"] == f"flamboyance:{target}"


def test_the_build_context_contains_the_dockerfile() -> None:
    assert (DEPLOY / COMPOSE["services"]["server"]["build"]["context"] / "Dockerfile").is_file()


def test_the_gpu_file_overrides_only_existing_services() -> None:
    assert CUDA["services"].keys() <= COMPOSE["services"].keys()


@pytest.mark.parametrize("file", [COMPOSE, CUDA], ids=["cpu", "cuda"])
def test_every_environment_variable_is_a_setting(file: dict[str, Any]) -> None:
    for name in file["services"]["server"]["environment"]:
        assert name.startswith(PREFIX)
        assert name.removeprefix(PREFIX).lower() in Settings.model_fields


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_volumes_exist_or_are_declared(name: str) -> None:
    for volume in COMPOSE["services"][name]["volumes"]:
        source = volume.split(":")[0]
        assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_ports_are_local_and_privileges_are_dropped(name: str) -> None:
    service = COMPOSE["services"][name]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_grace_period_exceeds_the_shutdown_timeout() -> None:
    seconds = int(COMPOSE["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert seconds > Settings.model_fields["shutdown_timeout"].default


def test_prometheus_scrapes_the_port_of_the_server() -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    (targets,) = job["static_configs"]
    # Prometheus sends no key.
    assert job["metrics_path"] in OPEN_PATHS
    for target in targets["targets"]:
        service, port = target.split(":")
        assert service in COMPOSE["services"]
        assert port == str(Settings.model_fields["port"].default)


def test_prometheus_reads_the_mounted_file() -> None:
    service = COMPOSE["services"]["prometheus"]
    _, mounted, mode = service["volumes"][0].split(":")
    assert f"--config.file={mounted}" in service["command"]
    assert mode == "ro"
