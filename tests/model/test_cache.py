"""Ctrl-C ends an import without a traceback, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# the process of an import, which never ends
STALLED = """
import sys, time
from pathlib import Path
from model.cache import begin_import
from model.folder import moved_when_complete
begin_import()
with moved_when_complete(Path(sys.argv[1])) as partial:
    (partial / "half").touch()
    print("writing", file=sys.stderr, flush=True)
    time.sleep(600)
"""
PARENT = """
import signal, sys
from model.cache import run_import
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
try:
    run_import("stalled_import", sys.argv[1])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_terminals_processes_ends_an_import_quietly_and_leaves_nothing(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "stalled_import.py").write_text(STALLED)
    folder = tmp_path / "cache" / "model"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "writing\n"
        os.killpg(process.pid, number)
        rest = process.stderr.read()
    assert (process.returncode, rest) == (128 + number, "")
    assert not list(folder.parent.iterdir())
