"""Processes that are killed when they may have ended already, and a server that is interrupted while it imports."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from asyncio.subprocess import DEVNULL
from pathlib import Path

import pytest

from server.signals import kill

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_process_that_has_just_ended_keeps_its_exit_status(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wait = os.waitpid

    def wait_late(pid: int, options: int) -> tuple[int, int]:
        if not options:  # asyncio waits so
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            time.sleep(0.2)
        return wait(pid, options)

    monkeypatch.setattr(os, "waitpid", wait_late)
    process = await asyncio.create_subprocess_exec("sleep", "60", stdin=DEVNULL)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    kill(process)
    assert await process.wait() == -signal.SIGKILL
    assert caplog.text == ""
    kill(process)


@pytest.mark.parametrize("command", [["server"], ["flamboyance", "serve"]], ids=" ".join)
def test_an_interrupt_while_the_server_is_imported_ends_it_quietly(command: list[str], tmp_path: Path) -> None:
    """A shell reports the status 130. As an exception, the interrupt would also crash an extension module at times."""
    (tmp_path / "pydantic_settings.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGINT)\n", encoding="utf-8"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    finished = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (-signal.SIGINT, "", "")
