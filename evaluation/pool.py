"""The processes of an evaluation: each has one thread, and ends when the evaluation's own process has ended."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any

import torch


def process_pool(num_processes: int, initialise: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """Return a pool whose processes call `initialise` with the arguments when they start."""
    return ProcessPoolExecutor(num_processes, get_context("spawn"), _start, (initialise, *arguments))


def _start(initialise: Callable[..., None], *arguments: Any) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    initialise(*arguments)


def _end_with_parent() -> None:
    """Without this, a process would compute all tasks that its parent had queued before it was killed."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)
