"""The process that owns the device. Its loop: inbox -> engine.step -> emit, and a beat about once a second.

Started as `python -m server.engine.worker` with `Start` as the first line of its input. The input stays open: when it
ends, the API process is gone, and so is this one.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import zmq

from server import logs
from server.settings import Settings
from server.wire import (
    MAX_MESSAGE_BYTES,
    Abort,
    Beat,
    Embed,
    EmbedText,
    Generate,
    Inbound,
    Inspect,
    MediaFailed,
    MediaPixels,
    Outbound,
    Pin,
    Ready,
    Request,
    Score,
    Start,
    decode_inbound,
    encode,
)

BEAT_SECONDS = 0.5

logger = logging.getLogger(__name__)


class EngineLike(Protocol):
    def add(self, request: Request) -> None: ...

    def abort(self, abort: Abort) -> None: ...

    def supply(self, media: MediaPixels) -> None: ...

    def fail_media(self, failure: MediaFailed) -> None: ...

    def pin(self, pin: Pin) -> None: ...

    def step(self) -> list[Outbound]: ...

    def has_work(self) -> bool: ...

    def is_waiting_for_media(self) -> bool: ...

    def gauges(self) -> dict[str, float]: ...


Factory = Callable[[Settings], tuple[EngineLike, dict[str, Any]]]


class Worker:
    def __init__(self, engine: EngineLike, socket: zmq.Socket[bytes]) -> None:
        self._engine = engine
        self._socket = socket
        self._last_step = time.monotonic()
        self._next_beat = 0.0

    def run(self, info: dict[str, Any]) -> None:
        self._emit(Ready(info={"pid": os.getpid(), **info}))
        while True:
            self.turn()

    def turn(self) -> None:
        """One round of the loop. It waits only where a step could do nothing."""
        self._receive(0 if self._is_busy() else self._until_beat())
        if self._engine.has_work():
            for event in self._engine.step():
                self._emit(event)
            self._last_step = time.monotonic()
        self._beat()

    def _is_busy(self) -> bool:
        return self._engine.has_work() and not self._engine.is_waiting_for_media()

    def _receive(self, timeout: float) -> None:
        wait_ms = max(int(timeout * 1000), 0)
        while self._socket.poll(wait_ms):
            self._take(decode_inbound.decode(self._socket.recv()))
            wait_ms = 0

    def _take(self, message: Inbound) -> None:
        match message:
            case Generate() | Score() | Embed() | EmbedText() | Inspect():
                self._engine.add(message)
            case Abort():
                self._engine.abort(message)
            case MediaPixels():
                self._engine.supply(message)
            case MediaFailed():
                self._engine.fail_media(message)
            case Pin():
                self._engine.pin(message)

    def _emit(self, event: Outbound) -> None:
        self._socket.send(encode(event))

    def _until_beat(self) -> float:
        return self._next_beat - time.monotonic()

    def _beat(self) -> None:
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + BEAT_SECONDS
        age = now - self._last_step if self._engine.has_work() else 0.0
        self._emit(Beat(gauges=self._engine.gauges(), last_step_age=age))


def resolve(factory: str) -> Factory:
    module, _, name = factory.partition(":")
    found: Factory = getattr(importlib.import_module(module), name)
    return found


def connect(address: str) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    # without it a worker that failed would wait for its last message to be read
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    return socket


def _end_with_parent() -> None:
    # not through sys.stdin: its lock, held here for ever, would not let the interpreter end
    while os.read(sys.stdin.fileno(), 1):
        pass
    # no clean-up: the device's memory goes with the process, and a step may hold the interpreter for long
    os._exit(0)


def main() -> None:
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    settings = Settings.model_validate_json(start.settings)
    logs.configure(settings.log_level, settings.log_format)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        engine, info = resolve(start.factory)(settings)
    except Exception:
        logger.exception("the engine could not be built")
        sys.exit(1)
    # what is there by now stays: a full collection that walks through it would hold up a step for long
    gc.collect()
    gc.freeze()
    Worker(engine, connect(start.address)).run(info)


if __name__ == "__main__":
    main()
