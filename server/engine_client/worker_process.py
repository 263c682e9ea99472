"""One life of the worker, seen from the API process: the child process and the socket to it. Pure asyncio.

Each life has a socket of its own, in a folder that only this user may enter: what was meant for a dead worker cannot
reach the next one.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from server.engine.worker import MAX_MESSAGE_BYTES, Start
from server.settings import Settings, child_environment
from server.wire import Inbound, Outbound, decode_outbound, encode

ROOT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 5.0

logger = logging.getLogger(__name__)


class WorkerProcess:
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
            *(sys.executable, "-m", "server.engine.worker"),
            stdin=PIPE,
            cwd=ROOT,
            env=child_environment(),
            start_new_session=True,
        )
        assert process.stdin is not None
        start = Start(factory=factory, address=address, settings=settings.to_worker())
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        return cls(process, socket)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Inbound) -> None:
        """Never waits: what may be in flight is bounded by admission."""
        self._outbox.put_nowait(encode(message))

    async def receive(self) -> Outbound:
        """Raises `msgspec.DecodeError` for what is no message of the wire."""
        return decode_outbound.decode(await self._socket.recv())

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self) -> None:
        """The end of its input ends the worker; one that does not end is killed."""
        self._sending.cancel()
        self._socket.close(linger=0)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _send_all(self) -> None:
        while True:
            await self._socket.send(await self._outbox.get())


def _bind(address: str) -> zmq.asyncio.Socket:
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.bind(address)
    return socket
