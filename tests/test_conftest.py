"""The guard in conftest.py: an environment that holds a distribution named `kernels` runs no test at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def collect(extra_path: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_conftest.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(extra_path)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_foreign_kernels_is_refused(tmp_path: Path) -> None:
    info = tmp_path / "kernels-0.4.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.4.0\n")
    refused = collect(tmp_path)
    assert refused.returncode != 0
    assert "the environment holds the distribution kernels 0.4.0" in refused.stderr


def test_the_plain_environment_is_accepted(tmp_path: Path) -> None:
    accepted = collect(tmp_path)
    assert accepted.returncode == 0, accepted.stderr
