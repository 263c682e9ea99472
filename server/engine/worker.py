"""Runs the process that owns the device: inbox -> engine.step -> emit, and a beat about twice a second.

It is started as `python -m server.engine.worker MODULE:FUNCTION`. It imports the module and waits for `Start`, the first
line of its input; then the function builds the engine and its `Ready.info` from settings. The input stays open: its end
means that the API process is gone, and ends this process too.
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
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from model.config import ConfigError
from server import wire
from server.settings import Settings, SettingsError
from server.telemetry import logs

if TYPE_CHECKING:  # the factory's module imports it, and torch with it
    from server.engine.engine import Engine

BEAT_SECONDS = 0.5
# seconds for the API process to read why a start was refused
REFUSED_SECONDS = 10.0

logger = logging.getLogger(__name__)


Factory = Callable[[Settings], tuple["Engine", dict[str, Any]]]


class Worker:
    def __init__(self, engine: Engine, socket: zmq.Socket[bytes]) -> None:
        self._engine = engine
        self._socket = socket
        self._last_step = time.monotonic()
        self._next_beat = 0.0

    def run(self, info: dict[str, Any]) -> None:
        self._emit(wire.Ready(info={"pid": os.getpid(), **info}))
        while True:
            self._run_once()

    def _run_once(self) -> None:
        """Run one round of the loop; wait only if a step could do nothing."""
        is_busy = self._engine.has_work() and not self._engine.is_waiting_for_media()
        self._receive(0.0 if is_busy else self._next_beat - time.monotonic())
        if self._engine.has_work():
            for event in self._engine.step():
                self._emit(event)
            self._last_step = time.monotonic()
        self._beat()

    def _receive(self, timeout: float) -> None:
        wait_ms = max(int(timeout * 1000), 0)
        while self._socket.poll(wait_ms):
            match wire.decode_inbound.decode(self._socket.recv()):
                case wire.Abort() as abort:
                    self._engine.abort(abort)
                case wire.MediaPixels() as media:
                    self._engine.supply(media)
                case wire.MediaFailed() as failure:
                    self._engine.fail_media(failure)
                case wire.Pin() as pin:
                    self._engine.pin(pin)
                case request:
                    self._engine.add(request)
            wait_ms = 0

    def _emit(self, event: wire.Outbound) -> None:
        self._socket.send(wire.encode(event))

    def _beat(self) -> None:
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + BEAT_SECONDS
        age = now - self._last_step if self._engine.has_work() else 0.0
        gauges, histograms = self._engine.gauges(), self._engine.histograms()
        self._emit(wire.Beat(gauges=gauges, histograms=histograms, last_step_age=age))


def resolve(factory: str) -> Factory:
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)


def connect(address: str) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    for option, value in wire.SOCKET_OPTIONS.items():
        socket.setsockopt(option, value)
    socket.connect(address)
    return socket


def refuse(address: str, message: str) -> None:
    """Report a start that cannot succeed, and wait to be ended by the API process, which has read the message then."""
    socket = connect(address)  # a socket without a name would be closed, and its message dropped
    socket.send(wire.encode(wire.StartRefused(message)))
    time.sleep(REFUSED_SECONDS)


def _watch_input(starts: SimpleQueue[bytes]) -> None:
    """Pass the first line on, and end the process at the end of the input, whatever it does."""
    line = b""
    # not through sys.stdin: its lock, held here for ever, would keep the interpreter from exiting
    while data := os.read(sys.stdin.fileno(), 2**16):
        line += data
        if line.endswith(b"\n"):
            starts.put(line)
    # no clean-up: the device's memory is freed with the process, and a step may hold the interpreter for long
    os._exit(0)


def main(factory: str) -> None:
    # imports and loading create many lasting objects and little garbage: collections would take a fifth of the time
    gc.disable()
    starts: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_watch_input, args=(starts,), daemon=True).start()
    build = resolve(factory)
    # the later collection visits only what the engine is made of; the little garbage of imports stays
    gc.freeze()
    start = msgspec.json.decode(starts.get(), type=wire.Start)
    settings = Settings.model_validate_json(start.settings)
    logs.configure(settings.log_level, settings.log_format)
    try:
        engine, info = build(settings)
    except (SettingsError, ConfigError) as error:
        refuse(start.address, str(error))
        sys.exit(2)
    except Exception:
        logger.exception("the engine could not be built")
        sys.exit(1)
    # all objects so far are permanent: a full collection that visits them would delay a step for long
    gc.collect()
    gc.freeze()
    gc.enable()
    Worker(engine, connect(start.address)).run(info)


if __name__ == "__main__":
    main(sys.argv[1])
