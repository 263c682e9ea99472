"""Runs the command line, in this process or in one of its own."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from flamboyance_client.cli import app as application

PACKAGE = Path(__file__).resolve().parents[4] / "clients" / "python"


def process(*arguments: str | Path) -> str:
    """Return what a process of the command line writes to stdout; it writes nothing to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE / "src")}
    command = [sys.executable, "-m", "flamboyance_client", *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def run(*arguments: str | Path, status: int = 0) -> tuple[str, str]:
    """Return what a command, in this process, writes to stdout and stderr."""
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        assert application.run([str(argument) for argument in arguments]) == status, errors.getvalue()
    return output.getvalue(), errors.getvalue()


def documents(*arguments: str | Path) -> list[dict[str, Any]]:
    """Return the JSON lines of a command, which writes nothing else, and nothing to stderr."""
    output, errors = run(*arguments, "--json")
    assert errors == ""
    return [json.loads(line) for line in output.splitlines()]


def words(output: str) -> list[list[str]]:
    """Return the words of each line of a table."""
    lines = [re.findall(r"[^\s│┃]+", line) for line in output.splitlines()]
    return [line for line in lines if line]
