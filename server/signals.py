"""The signals that end the server, the one that ends its processes, and those that suspend them."""

from __future__ import annotations

import os
import signal
import sys
from asyncio.subprocess import Process
from contextlib import suppress
from types import FrameType
from typing import NoReturn


def ending_signals() -> list[signal.Signals]:
    """Return SIGTERM, SIGINT and SIGHUP, which a closed terminal sends; without SIGHUP if it is ignored, as by `nohup`."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]


def raise_ending_signals() -> None:
    """Let the ending signals raise `SystemExit`, for a clean-up; SIGINT raises `KeyboardInterrupt` by itself."""
    for number in set(ending_signals()) - {signal.SIGINT}:
        signal.signal(number, _exit)


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def kill(process: Process) -> None:
    """Kill a process, unless it has ended.

    `Process.kill` could take the exit status of a process that has just ended, before Python 3.13.2: asyncio then warns of
    an unknown process, and reports the status 255.
    """
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def is_suspended(pid: int) -> bool:
    """Return whether a child process is stopped by a signal, from which it may never continue."""
    with suppress(ChildProcessError):  # it has ended
        return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    return False
