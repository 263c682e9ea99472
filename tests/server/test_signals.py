"""Processes that are killed when they may have ended already."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from asyncio.subprocess import DEVNULL

import pytest

from server.signals import kill


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
