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
# a worker that served this long was healthy: the next one is started without a pause
HEALTHY_SECONDS = 60.0
# starts that fail one after the other until the state is "failed"; more are tried
MAX_FAILED_STARTS = 3
# of the flags and of the pending signals in /proc/PID/stat
PF_EXITING = 0x4
PENDING_SIGKILL = 1 << 8

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
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", WORKER_MODULE),
                stdin=PIPE,
                cwd=ROOT,
                env=child_environment(),
                # in the session of the decode processes, which have a lower priority: it counts only within a session
                process_group=0,
            )
        except OSError:
            socket.close(linger=0)
            raise
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

    @property
    def is_exiting(self) -> bool:
        """True as soon as the process is killed or exits: waiting for it ends only when all of its memory is free.

        Only Linux tells; elsewhere it is False.
        """
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return sys.platform == "linux"
        fields = stat.rpartition(")")[2].split()  # from the third on
        return bool(int(fields[6]) & PF_EXITING or int(fields[28]) & PENDING_SIGKILL)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

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
            self.kill()
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
        self._state: State = "starting"
        self.info: dict[str, Any] = {}
        self.worker: WorkerProcess | None = None
        self._settings = settings
        self._factory = factory
        self._metrics = metrics
        self._start_settled = asyncio.Event()  # the first worker became ready, or failed
        self._ready_since: float | None = None  # of the current worker
        self._num_failed_starts = 0

    @property
    def state(self) -> State:
        """The state as of now: a worker that begins to exit is not ready, although its end is not yet noticed."""
        is_dying = self._state == "ready" and self.worker is not None and self.worker.is_exiting
        return "restarting" if is_dying else self._state

    async def workers(self) -> AsyncGenerator[WorkerProcess, None]:
        """Yield one worker after another; the caller serves each until it is dead.

        A worker that dies before any was ready is the last one: a wrong folder or too little memory would stop the next
        one too. After that, starts are tried for ever, with growing pauses: memory or a file may come back.
        """
        delay = 0.0
        with tempfile.TemporaryDirectory(prefix="flamboyance-") as folder:  # created with mode 0700
            for number in count():
                socket_file = Path(folder) / f"worker-{number}.sock"
                try:
                    worker = await WorkerProcess.spawn(self._settings, self._factory, socket_file)
                except OSError:  # too many processes or open files, or too little memory
                    logger.exception("the worker could not be started")
                    self._note_end()
                else:
                    try:
                        yield worker
                    finally:
                        self._note_end()
                        logger.error("the worker ended", extra={"exit_code": await worker.stop()})
                if not self._start_settled.is_set():
                    self._state = "failed"
                    self._start_settled.set()
                    return
                delay = 0.0 if self._was_healthy() else delay
                logger.warning("the worker is restarted", extra={"delay_seconds": delay})
                await asyncio.sleep(delay)
                delay = min(max(FIRST_DELAY, delay * 2), self._settings.max_restart_delay)
                self._ready_since = None
                self._metrics.engine_restarts.inc()

    def become_ready(self, worker: WorkerProcess, info: dict[str, Any]) -> None:
        self._state, self.worker, self.info = "ready", worker, info
        self._ready_since, self._num_failed_starts = time.monotonic(), 0
        self._metrics.engine_ready.set(1)
        self._start_settled.set()
        logger.info("the engine is ready", extra=info)

    def kill(self, worker: WorkerProcess) -> None:
        """Kill the current worker; another one is started when it has ended."""
        self._state, self.worker = "restarting", None
        self._metrics.engine_ready.set(0)
        worker.kill()

    async def loaded(self) -> None:
        """Return when the first worker is ready. Raises `EngineDied` if it died before."""
        await self._start_settled.wait()
        if self._state == "failed":
            raise EngineDied("the engine could not be started")

    def close(self) -> None:
        """Refuse requests from now on. The current worker ends when `workers` is closed."""
        self._state, self.worker = "stopped", None

    def _was_healthy(self) -> bool:
        return self._ready_since is not None and time.monotonic() - self._ready_since > HEALTHY_SECONDS

    def _note_end(self) -> None:
        """Note that the current worker serves no longer."""
        self._metrics.engine_ready.set(0)
        if self._state == "stopped":
            return
        self._num_failed_starts += self._ready_since is None
        self._state = "failed" if self._num_failed_starts >= MAX_FAILED_STARTS else "restarting"
        self.worker = None
