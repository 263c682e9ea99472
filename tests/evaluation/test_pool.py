"""The processes of an evaluation end with it, also if it is killed while they compute."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def initialise() -> None:
    pass


def report(seconds: float) -> None:
    print(os.getpid(), flush=True)
    time.sleep(seconds)


PROGRAM = """
from evaluation.pool import process_pool
from tests.evaluation.test_pool import initialise, report

if __name__ == "__main__":
    with process_pool(1, initialise) as pool:
        list(pool.map(report, [300.0] * 2))
"""


def test_processes_end_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        assert child.wait(30) is None or not child.is_running()
