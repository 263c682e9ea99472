"""Measurements that fail in different ways, each in a process of its own, for the tests of the kernel benchmark."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from kernels.bench.measure import Result, Stopwatch
from kernels.bench.sizes import Sizes


class CompilationError(Exception):
    """Like that of Triton, which is no RuntimeError."""


def succeed(watch: Stopwatch, sizes: Sizes, *, log: str = "") -> Result:
    """Return a value, and note in a file that it was measured."""
    if log:
        with Path(log).open("a") as file:
            file.write("measured\n")
    return Result.of(watch.time([lambda: None]))


def kill_itself(watch: Stopwatch, sizes: Sizes) -> Result:
    os.kill(os.getpid(), signal.SIGSEGV)
    return succeed(watch, sizes)


def hang(watch: Stopwatch, sizes: Sizes, *, pid_file: str) -> Result:
    Path(pid_file).write_text(str(os.getpid()))
    time.sleep(600)
    return succeed(watch, sizes)


def fail(watch: Stopwatch, sizes: Sizes) -> Result:
    raise CompilationError("at 3:7:\n  out of registers")


def leave(watch: Stopwatch, sizes: Sizes) -> Result:
    sys.exit(3)
