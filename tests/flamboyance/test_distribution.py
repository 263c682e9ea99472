"""The distribution: the contents of its wheel and sdist, and the command in an environment with nothing but the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.folder import save_folder
from tests.flamboyance.test_command_line import VERSION
from tests.server.test_main import CONFIG, ROOT, Server
from tests.tiny_models import byte_tokenizer, tiny_model

APPLICATION = ("evaluation", "kernels", "model", "server", "training")
INFORMATION = f"flamboyance-{VERSION}.dist-info"


@dataclass(frozen=True)
class Distribution:
    """A built distribution."""

    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """Build the sdist, and the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return Distribution(next(folder.glob("*.whl")), next(folder.glob("*.tar.gz")))


def files_of(folder: str) -> Set[str]:
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths}


def test_the_wheel_has_the_files_of_the_application_in_one_package(distribution: Distribution) -> None:
    expected = {
        *files_of("flamboyance"),
        *(f"flamboyance/app/{file}" for folder in APPLICATION for file in files_of(folder)),
        *(f"{INFORMATION}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")),
    }
    assert {"flamboyance/py.typed", "flamboyance/app/model/zoo/bridge.safetensors"} <= expected
    assert "flamboyance/app/server/api/static/docs.html" in expected
    assert set(zipfile.ZipFile(distribution.wheel).namelist()) == expected


def test_the_sdist_has_what_the_wheel_is_built_from(distribution: Distribution) -> None:
    expected = {file for folder in ("flamboyance", *APPLICATION) for file in files_of(folder)}
    project = {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", ".gitignore"}
    with tarfile.open(distribution.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == expected | project


@dataclass(frozen=True)
class Installation:
    """An environment with the wheel, and a working directory with names that must not be imported."""

    environment: Path
    working_directory: Path

    @property
    def site_packages(self) -> Path:
        return next(self.environment.glob("lib/python3.*/site-packages"))

    def popen(self, *arguments: str, stderr: Path) -> subprocess.Popen[bytes]:
        command = [str(self.environment / "bin" / "flamboyance"), *arguments]
        with stderr.open("wb") as file:
            return subprocess.Popen(command, cwd=self.working_directory, env=_environment(), stderr=file)

    def run(self, *arguments: str) -> str:
        command = [str(self.environment / "bin" / "flamboyance"), *arguments]
        finished = subprocess.run(
            command, cwd=self.working_directory, env=_environment(), capture_output=True, text=True, check=False
        )
        assert (finished.returncode, finished.stderr) == (0, "")
        return finished.stdout


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def installation(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Install the wheel alone; its dependencies are those of the environment of the tests."""
    folder = tmp_path_factory.mktemp("installation")
    venv.create(folder / "venv", with_pip=False)
    installed = Installation(folder / "venv", folder / "work")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "venv"),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
    ]
    subprocess.run([*pip, str(distribution.wheel)], check=True)
    for name in APPLICATION:
        (folder / "work" / name).mkdir(parents=True)
        (folder / "work" / name / "__init__.py").write_text("raise ImportError('of the working directory')\n")
    assert {path.name for path in installed.site_packages.iterdir()} == {"flamboyance", INFORMATION}
    dependencies = sysconfig.get_path("purelib")
    (installed.site_packages / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    return installed


def test_the_installed_command_has_the_version_of_the_project(installation: Installation) -> None:
    assert installation.run("--version") == f"flamboyance {VERSION}\n"


def test_the_installed_command_describes_a_model(installation: Installation) -> None:
    assert installation.run("describe", "flamingo-3b").startswith("flamingo-3b: gated layers")


@pytest.fixture
def server(installation: Installation, tmp_path: Path) -> Iterator[Server]:
    """Serve a model folder that is named relative to the working directory."""
    model = installation.working_directory / "tiny"
    save_folder(model, CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    folders = ("--data-dir", "data", "--cache-dir", "cache")
    quick = ("--kernels", "reference", "--spare-worker=false")  # nothing is compiled
    arguments = ("serve", "tiny", "--port", "0", "--log-format", "json", *folders, *quick)
    process = installation.popen(*arguments, stderr=tmp_path / "log")
    try:
        server = Server(process, tmp_path / "log")
        yield server
        server.http.close()
    finally:
        process.kill()
        process.wait()


def test_the_installed_command_serves_a_model(server: Server, installation: Installation) -> None:
    answer = server.complete(prompt="abc", max_tokens=3, temperature=0, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3
    assert server.http.get("/version").json()["version"] == VERSION
    assert (installation.working_directory / "cache" / "formats").is_dir()
    assert server.stop() == 0
