"""Runs a rank of a divided model other than rank 0: it repeats the calls of rank 0 on its own part, and sends no replies.

The worker starts it as `python -m server.engine.ranks.follower` and sends messages to its standard input. The end of the
input means that the worker has ended. It ends this process too, even while it waits for other ranks in a sum.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from model.layered import LayeredForward
from model.ranks import Rank
from server.engine.build import build_rank
from server.engine.device.runner import Runner
from server.engine.ranks.group import FAILED
from server.engine.ranks.messages import (
    Begin,
    BeginTexts,
    CopyBlocks,
    EndTexts,
    FillPages,
    Forward,
    Message,
    NextPiece,
    decode,
)
from server.settings import Settings
from server.telemetry import logs

# of prctl
PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


class Follower:
    """A rank that repeats the calls of rank 0 on its own runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._texts: dict[str, Iterator[int]] = {}  # the remaining pieces, by request

    @torch.inference_mode()
    def follow(self, message: Message) -> None:
        runner = self._runner
        match message:
            case CopyBlocks(copies):
                runner.copy_blocks(copies)
            case FillPages(slots, visual_tokens):
                runner.encoder.fill(slots, visual_tokens.tensor().to(runner.device, runner.dtype))
            case Forward():
                runner.forward(message.batch())
            case BeginTexts(request_id, token_ids, max_tokens):
                self._texts[request_id] = _pieces(runner, token_ids, max_tokens)
            case NextPiece(request_id):
                next(self._texts[request_id])
            case EndTexts(request_id):
                del self._texts[request_id]
            case Begin():
                raise ValueError("a rank can be started only once")


def _pieces(runner: Runner, token_ids: list[list[int]], max_tokens: int) -> Iterator[int]:
    """Run texts through the layers, piece by piece."""
    model = runner.model.language_model
    forward = LayeredForward(model, token_ids, max_tokens)
    for layer in model.layers:
        yield from forward.run(layer)


def _receive(messages: SimpleQueue[bytes]) -> None:
    """Put messages into the queue, and end the process at the end of the input."""
    connection = Connection(sys.stdin.fileno(), writable=False)
    with suppress(EOFError, OSError):  # the latter if a message is cut
        while True:
            messages.put(connection.recv_bytes())
    os._exit(0)


def _end_with_worker() -> None:
    """Make Linux kill this process when the worker ends, even if it is suspended or its threads cannot run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    _end_with_worker()
    messages: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(messages,), daemon=True).start()
    begin = decode(messages.get())
    assert isinstance(begin, Begin)
    settings = Settings.model_validate_json(begin.settings)
    logs.configure(settings.log_level, settings.log_format)
    rank = Rank(begin.number, begin.size)
    try:
        follower = Follower(build_rank(settings, rank, begin.store))
        while True:
            follower.follow(decode(messages.get()))
    except Exception:
        logger.exception("rank %d of the model failed", rank.number)
        os._exit(FAILED)  # a regular exit would wait for the thread that reads


if __name__ == "__main__":
    main()
