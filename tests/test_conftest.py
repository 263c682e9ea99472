"""No test runs in an environment with a distribution that is named `kernels`."""

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


def test_a_distribution_named_kernels_is_refused(tmp_path: Path) -> None:
    info = tmp_path / "kernels-0.4.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.4.0\n")
    result = collect(tmp_path)
    assert result.returncode != 0
    assert "the environment contains the distribution kernels 0.4.0" in result.stderr


def test_the_environment_of_the_tests_is_accepted(tmp_path: Path) -> None:
    result = collect(tmp_path)
    assert result.returncode == 0, result.stderr
