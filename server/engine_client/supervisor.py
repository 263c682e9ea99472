"""Keeps a worker process running: starts it, and restarts it with growing pauses when it has died. Pure asyncio.

Each worker has its own socket, in a folder that only this user may enter: a message to a dead worker cannot reach the next
one.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq
import zmq.asyncio

from server.errors import EngineDied
from server.metrics import Metrics
from server.settings import Settings, child_environment
from server.wire import MAX_MESSAGE_BYTES, WORKER_MODULE, Inbound, Outbound, Start, decode_outbound, encode

ROOT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 5.0
FIRST_DELAY = 0.5
# a worker that served this long was healthy: the next pause is short again
HEALTHY_SECONDS = 60.0

State = Literal["starting", "ready", "restarting", "failed", "stopped"]

logger = logging.getLogger(__name__)


class WorkerProcess:
    """One worker, seen from the API process: the child process and the socket to it."""

    def __init__(self, process: Process, socket: zmq.asyncio.Socket) -> None:
        self._process = process
        self._socket = socket
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._sending = asyncio.create_task(self._send_all())

    @classmethod
    async def spawn(cls, settings: Settings, factory: str, socket_file: Path) -> WorkerProcess:
        address = f"ipc://{socket_file}"
        socket = _bind(address)
        socket_file.chmod(0o600)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", WORKER_MODULE),
            stdin=PIPE,
            cwd=ROOT,
            env=child_environment(),
            start_new_session=True,
        )
        assert process.stdin is not None
        start = Start(factory=factory, address=address, settings=settings.to_worker())
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        return cls(process, socket)

    def send(self, message: Inbound) -> None:
        """Queue a message without waiting: admission bounds the number of messages in flight."""
        self._outbox.put_nowait(encode(message))

    async def serve(self, handle: Callable[[Outbound], None]) -> None:
        """Pass each message to `handle` until the worker is dead, or sends a message that cannot be decoded."""
        receiving = asyncio.create_task(self._receive_all(handle))
        exiting = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait({receiving, exiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            receiving.cancel()
            exiting.cancel()
        if receiving.done() and not receiving.cancelled() and (error := receiving.exception()):
            logger.error("a message of the worker could not be handled", extra={"error": str(error)})

    async def stop(self) -> int:
        """Close the worker's input, which ends it; kill it if it does not end. Return its exit code."""
        self._sending.cancel()
        self._socket.close(linger=0)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                return await self._process.wait()
        except TimeoutError:
            self._process.kill()
            return await self._process.wait()

    async def _send_all(self) -> None:
        while True:
            await self._socket.send(await self._outbox.get())

    async def _receive_all(self, handle: Callable[[Outbound], None]) -> None:
        with suppress(zmq.ZMQError):  # the socket was closed
            while True:
                handle(decode_outbound.decode(await self._socket.recv()))


def _bind(address: str) -> zmq.asyncio.Socket:
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.bind(address)
    return socket


class Supervisor:
    """Starts workers one after another. `worker` is the current one, while it is ready; `info` is from its `Ready`."""

    def __init__(self, settings: Settings, factory: str, metrics: Metrics) -> None:
        self.state: State = "starting"
        self.info: dict[str, Any] = {}
        self.worker: WorkerProcess | None = None
        self._settings = settings
        self._factory = factory
        self._metrics = metrics
        self._start_settled = asyncio.Event()  # the first worker became ready, or failed

    async def workers(self) -> AsyncGenerator[WorkerProcess, None]:
        """Yield one worker after another; the caller serves each until it is dead.

        A worker that dies before any was ready is the last one: a wrong folder or too little memory would stop the next
        one too.
        """
        delay = FIRST_DELAY
        with tempfile.TemporaryDirectory(prefix="flamboyance-") as folder:  # created with mode 0700
            for number in count():
                started = time.monotonic()
                socket_file = Path(folder) / f"worker-{number}.sock"
                worker = await WorkerProcess.spawn(self._settings, self._factory, socket_file)
                try:
                    yield worker
                finally:
                    await self._end(worker)
                if not self._start_settled.is_set():
                    self.state = "failed"
                    self._start_settled.set()
                    return
                delay = FIRST_DELAY if time.monotonic() - started > HEALTHY_SECONDS else delay
                logger.warning("the worker is restarted", extra={"delay_seconds": delay})
                await asyncio.sleep(delay)
                delay = min(delay * 2, self._settings.max_restart_delay)
                self._metrics.engine_restarts.inc()

    def become_ready(self, worker: WorkerProcess, info: dict[str, Any]) -> None:
        self.state, self.worker, self.info = "ready", worker, info
        self._metrics.engine_ready.set(1)
        self._start_settled.set()
        logger.info("the engine is ready", extra=info)

    async def loaded(self) -> None:
        """Return when the first worker is ready. Raises `EngineDied` if it died before."""
        await self._start_settled.wait()
        if self.state == "failed":
            raise EngineDied("the engine could not be started")

    def close(self) -> None:
        """Refuse requests from now on. The current worker ends when `workers` is closed."""
        self.state, self.worker = "stopped", None

    async def _end(self, worker: WorkerProcess) -> None:
        self._metrics.engine_ready.set(0)
        if self.state == "stopped":
            await worker.stop()
            return
        self.state, self.worker = "restarting", None
        logger.error("the worker died", extra={"exit_code": await worker.stop()})
