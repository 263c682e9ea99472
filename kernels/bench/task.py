"""Measurements as data, each of which runs in a separate process, so that a failure does not affect the others.

An illegal memory access, for example, makes every later call of its process fail.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import connection, context, get_context
from typing import Any, TypeAlias

import torch

from kernels.bench.measure import Result, Stopwatch
from kernels.bench.sizes import SIZES

# forks from a process that has imported torch and has not used a GPU
CONTEXT = get_context("forkserver")
PRELOADED = ["kernels.bench.core", "kernels.bench.tuning", "bench.whole_model"]
MAX_REASON = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One value to be measured: `function`, MODULE:NAME, is called with a stopwatch, the sizes and the arguments."""

    stage: str
    case: str
    name: str  # of the implementation
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    max_seconds: float = 90.0
    launch: Mapping[str, Any] | None = None  # the row of the launch table that is tried

    @property
    def key(self) -> tuple[str, str, str]:
        return self.stage, self.case, self.name


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a task has no result."""

    reason: str


Outcome: TypeAlias = Result | Failure


def run(task: Task, sizes: str) -> Outcome:
    """Run a task in a process; a process that takes too long is killed."""
    CONTEXT.set_forkserver_preload(PRELOADED)  # only the first call has an effect
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_measure, args=(sender, task, sizes))
    process.start()
    sender.close()
    try:
        if not connection.wait([receiver, process.sentinel], task.max_seconds):
            return Failure(f"out of time after {task.max_seconds:g} seconds")
        return receiver.recv() if receiver.poll() else _ended(process)
    except EOFError:
        return _ended(process)
    finally:
        _kill(process)
        receiver.close()


def _ended(process: context.ForkServerProcess) -> Failure:
    process.join()
    code = process.exitcode or 0
    return Failure(f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}")


def _kill(process: context.ForkServerProcess) -> None:
    """Kill a process and the processes that it has started."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it has ended, or has no group of its own yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    process.close()


def _measure(sender: connection.Connection, task: Task, sizes: str) -> None:
    os.setsid()
    try:
        outcome: Outcome = _result(task, sizes)
    except Exception as error:  # whatever a kernel, a compiler or a driver raises is the result
        reason = " ".join(str(error).split())
        outcome = Failure(f"{type(error).__name__}: {reason}"[:MAX_REASON])
    sender.send(outcome)


def _result(task: Task, sizes: str) -> Result:
    module, _, name = task.function.partition(":")
    function: Callable[..., Result] = getattr(import_module(module), name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # with more, toy sizes mostly wait at barriers
    torch.manual_seed(0)
    with torch.inference_mode():
        return function(Stopwatch(device, SIZES[sizes].replays), SIZES[sizes], **task.arguments)
