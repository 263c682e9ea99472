"""The compose files and Prometheus' own: every path, target, port and variable that they name is there."""

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
def test_each_builds_its_target(file: dict[str, Any], target: str) -> None:
    server = file["services"]["server"]
    assert server["build"]["target"] == target
    assert server["image"] == f"flamboyance:{target}"


def test_the_build_starts_where_the_dockerfile_is() -> None:
    assert (DEPLOY / COMPOSE["services"]["server"]["build"]["context"] / "Dockerfile").is_file()


def test_the_file_for_gpus_only_changes_what_is_there() -> None:
    assert CUDA["services"].keys() <= COMPOSE["services"].keys()


@pytest.mark.parametrize("file", [COMPOSE, CUDA], ids=["cpu", "cuda"])
def test_every_variable_of_the_server_is_a_setting(file: dict[str, Any]) -> None:
    for name in file["services"]["server"]["environment"]:
        assert name.startswith(PREFIX)
        assert name.removeprefix(PREFIX).lower() in Settings.model_fields


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_volumes_are_files_here_or_declared(name: str) -> None:
    for volume in COMPOSE["services"][name]["volumes"]:
        source = volume.split(":")[0]
        assert (DEPLOY / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_nothing_is_open_to_other_hosts_and_nothing_may_become_root(name: str) -> None:
    service = COMPOSE["services"][name]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_stopping_waits_for_running_requests() -> None:
    seconds = int(COMPOSE["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert seconds > Settings.model_fields["shutdown_timeout"].default


def test_prometheus_scrapes_the_server_where_it_listens() -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    (targets,) = job["static_configs"]
    # it carries no key
    assert job["metrics_path"] in OPEN_PATHS
    for target in targets["targets"]:
        service, port = target.split(":")
        assert service in COMPOSE["services"]
        assert port == str(Settings.model_fields["port"].default)


def test_prometheus_reads_the_file_that_is_mounted() -> None:
    service = COMPOSE["services"]["prometheus"]
    _, mounted, mode = service["volumes"][0].split(":")
    assert f"--config.file={mounted}" in service["command"]
    assert mode == "ro"
