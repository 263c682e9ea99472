"""Limits connections to HTTP clients, so that clients that send or read nothing cannot use up all connections.

The head of a request must arrive in time. When all connections are in use, a new one replaces the connection whose client
has been silent longest: it has a request to send, or a response to read.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# file descriptors of the process besides its connections: listener, database, media files, pipes to other processes
OTHER_FILES = 256


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of the listener: `header_timeout` is the seconds in which the head of a request must arrive."""

    max_connections: int
    header_timeout: float


class Connection(H11Protocol):
    """Uvicorn's HTTP connection, within `limits`."""

    def __init__(self, *arguments: Any, limits: ConnectionLimits, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._limits = limits
        self._last_active = self.loop.time()  # when its client last sent or read something
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._last_active = self.loop.time()
        self._time_head()
        if len(self.connections) > self._limits.max_connections:
            self._most_silent().close()

    def data_received(self, data: bytes) -> None:
        self._last_active = self.loop.time()
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._time_head()
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

    def _time_head(self) -> None:
        """Start the timer of a request's head, unless it is running: single bytes do not restart it."""
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.header_timeout, self.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def permit_open_files(limits: ConnectionLimits) -> None:
    """Raise the soft limit of open files, which is often 1024, as far as the hard limit permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.max_connections + OTHER_FILES
    if soft < needed:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )
