"""Limits connections to HTTP clients, so that clients that send or read nothing cannot use up all connections.

The head of a request must arrive in time. When all connections are in use, a new one replaces the connection whose client
has been silent longest: it has a request to send, or a response to read. A response that ends a connection before the
body has arrived can still be read: the rest of the body is dropped for some seconds. In each turn of the event loop, a
connection reads no more than takes some milliseconds.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from typing import Any, cast

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import InvalidRequest
from server.limits.framing import Framing
from server.settings import Settings

# file descriptors of the process besides its connections: listener, database, media files, pipes to other processes
OTHER_FILES = 256
# after a response that ends the connection: the time in which the rest of the body is read and dropped, and the pause after
# each read of at most 256 KiB, so that dropping takes little of the event loop's time
DROP_SECONDS = 10.0
DROP_PAUSE = 0.01
# Bytes that a connection reads at once; it reads less of heads and small chunks, which take more time than their bytes.
READ_BYTES = 2**18
SLOW_READ_BYTES = 2**16
# where all connections read: what one has read is parsed, and copied, before the next one reads
_BUFFER = memoryview(bytearray(READ_BYTES))


class _LingeringTransport:
    """A transport that stays open for reading after `close` if a body `is_unread`; the timer of `linger` closes it later.

    A system that closes a socket with unread data resets the connection, and then the client loses the response, too.
    """

    def __init__(self, transport: asyncio.Transport, is_unread: Callable[[], bool], linger: Callable[[], None]) -> None:
        self.is_lingering = False
        self._transport = transport
        self._is_unread = is_unread
        self._linger = linger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.is_lingering or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing() or not self._is_unread():
            self._transport.close()
        else:
            self.is_lingering = True
            self._transport.write_eof()
            self._linger()


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """Uvicorn's HTTP connection, within the limits of the `settings`.

    asyncio lets a buffered protocol say how much it reads at once.
    """

    conn: Framing

    def __init__(self, *arguments: Any, settings: Settings, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.conn = Framing()
        self._settings = settings
        self._last_active = self.loop.time()  # when its client last sent or read something
        self._timer: asyncio.TimerHandle | None = None  # closes the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._lingering = _LingeringTransport(transport, lambda: self.conn.their_state is h11.SEND_BODY, self._linger)
        super().connection_made(cast(asyncio.Transport, self._lingering))
        self._last_active = self.loop.time()
        self._start_timer(self._settings.header_timeout)
        if len(self.connections) > self._settings.max_connections:
            self._most_silent().close()

    def get_buffer(self, sizehint: int) -> memoryview:
        is_fast = self.conn.is_coarse or self._lingering.is_lingering
        return _BUFFER if is_fast else _BUFFER[:SLOW_READ_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        self._last_active = self.loop.time()
        if self._lingering.is_lingering:
            self.flow.pause_reading()
            self.loop.call_later(DROP_PAUSE, self.flow.resume_reading)
            return
        self.data_received(_BUFFER[:nbytes])  # type: ignore[arg-type]  # h11 copies them
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            self._start_timer(self._settings.header_timeout)
        else:
            self._stop_timer()

    def _should_upgrade(self) -> bool:
        """Answer a request for another protocol, such as that of WebSockets, in HTTP/1.1: no route has another one."""
        return False

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP, unless the response has begun; a request whose body they are ends."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refusal = InvalidRequest(f"{msg} {self.conn.fault}".rstrip())
            body = msgspec.json.encode(refusal.body())
            headers = {**refusal.headers(), "Content-Type": "application/json", "Content-Length": str(len(body))}
            lines = [*headers.items(), ("Connection", "close")]
            response = h11.Response(status_code=refusal.status, headers=lines, reason=b"Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        self._last_active = self.loop.time()  # until now it read what was sent
        super().pause_writing()

    def resume_writing(self) -> None:
        self._last_active = self.loop.time()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def close(self) -> None:
        """Close the connection at once; a request whose body is incomplete sees its client disconnect."""
        self.connections.discard(self)
        self.transport.abort()

    def _most_silent(self) -> Connection:
        """Return the connection that has waited longest for its client, or this one if none waits."""
        waiting = [c for c in self.connections if isinstance(c, Connection) and c._awaits_client()]
        return min(waiting, key=lambda c: c._last_active, default=self)

    def _awaits_client(self) -> bool:
        is_sending = self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.flow.read_paused
        return is_sending or self.flow.write_paused

    def _linger(self) -> None:
        self._stop_timer()
        self._start_timer(DROP_SECONDS)
        self.flow.resume_reading()

    def _start_timer(self, seconds: float) -> None:
        """Start the timer, unless it is running: the single bytes of a head do not restart it."""
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def permit_open_files(settings: Settings) -> None:
    """Raise the soft limit of open files, which is often 1024, as far as the hard limit permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.max_connections + OTHER_FILES
    if soft < needed:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )
