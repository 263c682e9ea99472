"""One worker process, seen from the API process: the child process and the socket to it.

Each worker has its own socket, in a folder that only this user may enter: a message to a dead worker cannot reach the next
one.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import zmq
import zmq.asyncio

from server.settings import ROOT, Settings, child_environment
from server.signals import kill
from server.wire import SOCKET_OPTIONS, WORKER_MODULE, Inbound, Outbound, Start, decode_outbound, encode

STOP_SECONDS = 5.0
# indices of two fields of /proc/PID/stat after the name, the flags and the pending signals, and a bit of each
FLAGS, SIGNALS = 6, 28
PF_EXITING = 0x4
PENDING_SIGKILL = 1 << 8

logger = logging.getLogger(__name__)


class WorkerProcess:
    """A process that has imported its engine, or is importing it, and builds it after `start`."""

    def __init__(self, process: Process, socket: zmq.asyncio.Socket, address: str, resources: ExitStack) -> None:
        self._process = process
        self._socket = socket
        self._address = address
        self._resources = resources
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._sending = asyncio.create_task(self._send_all())

    @classmethod
    async def spawn(cls, factory: str, variables: Mapping[str, str]) -> WorkerProcess:
        """Spawn a process, with these variables in its environment.

        Raises `OSError` or `zmq.ZMQError` if there are too many processes or files, or no memory.
        """
        with ExitStack() as resources:
            folder = resources.enter_context(TemporaryDirectory(prefix="flamboyance-"))  # created with mode 0700
            socket_file = Path(folder) / "worker.sock"
            address = f"ipc://{socket_file}"
            socket = resources.enter_context(_bind(address))
            socket_file.chmod(0o600)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", WORKER_MODULE, factory),
                stdin=PIPE,
                cwd=ROOT,
                env=child_environment(**variables),
                # in the session of the decode processes: their lower priority has an effect only within a session
                process_group=0,
            )
            return cls(process, socket, address, resources.pop_all())

    def start(self, settings: Settings) -> None:
        """Send the settings, with which the process builds its engine."""
        assert self._process.stdin is not None
        start = Start(address=self._address, settings=settings.to_worker())
        self._process.stdin.write(msgspec.json.encode(start) + b"\n")

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
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_exiting(self) -> bool:
        """True as soon as the process is killed or exits; `wait` returns only when all of its memory is free.

        This is known only on Linux; elsewhere it is False until then.
        """
        if self._process.returncode is not None:
            return True
        if (fields := self._read_stat()) is None:
            return sys.platform == "linux"
        return bool(int(fields[FLAGS]) & PF_EXITING or int(fields[SIGNALS]) & PENDING_SIGKILL)

    def kill(self) -> None:
        kill(self._process)

    async def wait(self) -> int:
        """Return the exit code of the process when it has ended."""
        return await self._process.wait()

    async def stop(self) -> int:
        """Close the worker's input, at which it should exit; kill it if it does not. Return its exit code."""
        self._sending.cancel()
        self._resources.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                return await self._process.wait()
        except TimeoutError:
            self.kill()
            return await self._process.wait()

    def _read_stat(self) -> list[str] | None:
        """Return the fields of /proc/PID/stat from the third one (the state) on; None if there are none."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        return stat.rpartition(")")[2].split()

    async def _send_all(self) -> None:
        while True:
            await self._socket.send(await self._outbox.get())

    async def _receive_all(self, handle: Callable[[Outbound], None]) -> None:
        with suppress(zmq.ZMQError):  # the socket was closed
            while True:
                handle(decode_outbound.decode(await self._socket.recv()))


def _bind(address: str) -> zmq.asyncio.Socket:
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    for option, value in SOCKET_OPTIONS.items():
        socket.setsockopt(option, value)
    socket.bind(address)
    return socket
