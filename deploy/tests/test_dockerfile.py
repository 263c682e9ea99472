"""The Dockerfile is linted, and `deploy.rehearsal` knows all of its steps; `make rehearse-image` runs them."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy import image
from deploy.image import Builder, Outside, Stage, UnknownStep

ROOT = Path(__file__).resolve().parents[2]


def test_hadolint_finds_nothing() -> None:
    program = Path(sysconfig.get_path("scripts"), "hadolint")
    command = [str(program), "--config", str(ROOT / "deploy" / "hadolint.yaml"), str(ROOT / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Run:
    """Stands in for commands in a chroot, which need root: it notes them, and makes what later steps copy."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.variables: list[dict[str, str]] = []

    def __call__(
        self, stage: Stage, command: Sequence[str], environment: dict[str, str], *, paths: Sequence[Path]
    ) -> subprocess.Popen[bytes]:
        self.commands.append(command[-1])
        self.variables.append(environment)
        stage.path("/opt/venv/bin").mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(["true"])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(image, "run", run := Run())
    return run


def builder(dockerfile: Path, folder: Path, **arguments: str) -> Builder:
    return Builder(dockerfile, folder, Outside(ROOT), lambda _, root: root.mkdir(), arguments)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_every_step_of_the_dockerfile_is_known(target: str, tmp_path: Path, run: Run) -> None:
    stage = builder(ROOT / "Dockerfile", tmp_path, PYTHON="3.13", TORCH_INDEX="here").build(target)
    assert (tmp_path / "python-3.13-slim").is_dir()
    assert (stage.user, stage.folder) == ("10001:10001", "/home/flamboyance")
    assert stage.entrypoint == ("flamboyance", "serve")
    assert stage.health[:2] == ("python", "-c")
    assert stage.volumes == ("/home/flamboyance/.cache", "/home/flamboyance/data")
    assert stage.environment["PATH"].startswith("/opt/venv/bin:/usr/local/bin")
    assert stage.path("/opt/venv/bin").is_dir()
    assert not stage.path("/build").exists()
    build = tmp_path / f"packages-{target}" / "build"
    assert {path.name for path in build.iterdir()} >= {"pyproject.toml", "server", "model"}
    assert not list(build.rglob("__pycache__"))
    indexes = [values["TORCH_INDEX"] for values in run.variables if "TORCH_INDEX" in values]
    assert indexes == (["here"] * 2 if target == "cpu" else [])
    assert any("useradd" in command for command in run.commands)


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM a AS b\nONBUILD RUN true\n")
    with pytest.raises(UnknownStep, match="ONBUILD"):
        builder(tmp_path / "Dockerfile", tmp_path).build("b")


def test_a_step_that_fails_ends_the_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Dockerfile").write_text("FROM a AS b\nRUN false\n")
    monkeypatch.setattr(image, "run", lambda *_, **__: subprocess.Popen(["false"]))
    with pytest.raises(subprocess.CalledProcessError):
        builder(tmp_path / "Dockerfile", tmp_path).build("b")
