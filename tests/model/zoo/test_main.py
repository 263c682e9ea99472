"""The command `python -m model.zoo`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from model.cache import ROOT
from model.zoo.default import locate


def zoo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "model.zoo", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_prepare_prints_the_folder_and_nothing_else(tmp_path: Path) -> None:
    locate(tmp_path).mkdir()
    (locate(tmp_path) / "config.json").touch()
    finished = zoo("prepare", "--cache", str(tmp_path))
    assert (finished.returncode, finished.stdout) == (0, f"{locate(tmp_path)}\n")


def test_without_a_command_usage_is_printed() -> None:
    finished = zoo()
    assert finished.returncode == 2
    assert "usage: python -m model.zoo" in finished.stderr
