"""The processes of a divided model: rank 0 is the worker, which starts the others and ends if any of them ends.

A rank reads its messages from its standard input, whose end means that the worker has ended. All processes are on one
machine; sums are exchanged over the loopback interface, or between the GPUs.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from model.parallel import Group, ProcessGroup
from model.ranks import Rank
from server.engine.ranks.messages import Begin, Followers, encode
from server.settings import ROOT, Settings, child_environment

MODULE = "server.engine.ranks.follower"
# long, because a rank may still load its weights while another one waits; the end of a process is noticed at once
TIMEOUT = timedelta(hours=1)
FAILED = 1

logger = logging.getLogger(__name__)


@contextmanager
def leading(settings: Settings) -> Iterator[tuple[Followers, str]]:
    """Start the other ranks; yield them and the rendezvous file of all ranks, which is removed afterwards."""
    with TemporaryDirectory(prefix="flamboyance-ranks-") as folder:
        store, size = f"{folder}/store", settings.tensor_parallel
        sends = []
        for number in range(1, size):
            process, connection = _start()
            sends.append(connection.send_bytes)
            sends[-1](encode(Begin(settings.to_worker(), number, size, store)))
            threading.Thread(target=_end_with, args=(process, number), daemon=True).start()
        yield Followers(sends), store


def connect(rank: Rank, store: str, device: torch.device) -> Group:
    """Return the group once all ranks have called this; `store` is the rendezvous file, not needed afterwards."""
    file = dist.FileStore(store, rank.size)  # type: ignore[attr-defined]
    group = ProcessGroup(_nccl(file, rank) if device.type == "cuda" else _gloo(file, rank))
    group.add_up(torch.zeros(1, device=device))  # NCCL connects at the first sum
    return group


def _gloo(file: Any, rank: Rank) -> Any:
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    # other machines could connect to any other interface
    options._devices = [kind.create_device(hostname="127.0.0.1")]
    options._timeout = TIMEOUT
    return kind(file, rank.number, rank.size, options)


def _nccl(file: Any, rank: Rank) -> Any:
    kind: Any = dist.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = TIMEOUT
    return kind(file, rank.number, rank.size, options)


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a rank; return its process and the connection to its standard input."""
    theirs, ours = Pipe(duplex=False)
    with theirs:
        command = [sys.executable, "-m", MODULE]
        return subprocess.Popen(command, stdin=theirs.fileno(), cwd=ROOT, env=child_environment()), ours


def _end_with(process: subprocess.Popen[bytes], number: int) -> None:
    """End this process when another rank has ended: no step can be computed without it, and this one may wait for it."""
    exit_code = process.wait()
    logger.error("rank %d of the model ended", number, extra={"exit_code": exit_code})
    logging.shutdown()
    os._exit(FAILED)
