"""Limits connections to HTTP clients, so that clients that send or read nothing cannot use up all connections.

The head of a request must arrive in time. When all connections are in use, a new one replaces the connection whose client
has been silent longest: it has a request to send, or a response to read. A response that ends a connection before the
body has arrived can still be read: the rest of the body is dropped for some seconds.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# file descriptors of the process besides its connections: listener, database, media files, pipes to other processes
OTHER_FILES = 256
# after a response that ends the connection: the time in which the rest of the body is read and dropped, and the pause after
# each read of at most 256 KiB, so that dropping takes little of the event loop's time
DROP_SECONDS = 10.0
DROP_PAUSE = 0.01


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of the listener: `header_timeout` is the seconds in which the head of a request must arrive."""

    max_connections: int
    header_timeout: float


class _LingeringTransport:
    """A transport whose `close` ends only its responses if `is_unread`, until the client or a timer closes it.

    A system that closes a socket with unread data resets the connection, and then the client loses the response, too.
    """

    def __init__(self, transport: asyncio.Transport, is_unread: Callable[[], bool]) -> None:
        self.is_lingering = False
        self._transport = transport
        self._is_unread = is_unread

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


class Connection(H11Protocol):
    """Uvicorn's HTTP connection, within `limits`."""

    def __init__(self, *arguments: Any, limits: ConnectionLimits, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._limits = limits
        self._last_active = self.loop.time()  # when its client last sent or read something
        self._timer: asyncio.TimerHandle | None = None  # closes the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._lingering = _LingeringTransport(transport, lambda: self.conn.their_state is h11.SEND_BODY)
        super().connection_made(cast(asyncio.Transport, self._lingering))
        self._last_active = self.loop.time()
        self._start_timer(self._limits.header_timeout)
        if len(self.connections) > self._limits.max_connections:
            self._most_silent().close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._lingering.is_lingering:
            self._start_timer(DROP_SECONDS)
            self.flow.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._last_active = self.loop.time()
        if self._lingering.is_lingering:
            self.flow.pause_reading()
            self.loop.call_later(DROP_PAUSE, self.flow.resume_reading)
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._start_timer(self._limits.header_timeout)
        else:
            self._stop_timer()

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

    def _start_timer(self, seconds: float) -> None:
        """Start the timer, unless it is running: the single bytes of a head do not restart it."""
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def permit_open_files(limits: ConnectionLimits) -> None:
    """Raise the soft limit of open files, which is often 1024, as far as the hard limit permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.max_connections + OTHER_FILES
    if soft < needed:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )
