"""Who may come in: counted when a request is accepted, before its body is read, so that refusing costs nothing.

A ticket is held from acceptance to the last byte. It waits until the engine begins its prompt, then it runs.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from server.errors import Overloaded, ShuttingDown
from server.metrics import Metrics


class Ticket:
    """Use as a context manager around everything that a request does."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._is_waiting = True

    def started(self) -> None:
        """The engine has begun this request."""
        if self._is_waiting:
            self._is_waiting = False
            self._admission.move(waiting=-1, running=1)

    def __enter__(self) -> Ticket:
        self._admission.move(waiting=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.move(waiting=-1) if self._is_waiting else self._admission.move(running=-1)


class Admission:
    def __init__(self, max_num_queued: int, metrics: Metrics) -> None:
        self.num_waiting = 0
        self.num_running = 0
        self.is_closed = False
        self._max_num_queued = max_num_queued
        self._metrics = metrics
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def is_full(self) -> bool:
        return self.num_waiting >= self._max_num_queued

    def ticket(self) -> Ticket:
        """Raises `Unavailable`: a full queue, or a server that is shutting down."""
        if self.is_closed:
            raise ShuttingDown("the server is shutting down")
        if self.is_full:
            raise Overloaded(f"{self.num_waiting} requests wait already, the limit is {self._max_num_queued}")
        return Ticket(self)

    def close(self) -> None:
        self.is_closed = True

    async def idle(self) -> None:
        """Returns once no request is in flight."""
        await self._is_idle.wait()

    def move(self, *, waiting: int = 0, running: int = 0) -> None:
        self.num_waiting += waiting
        self.num_running += running
        self._metrics.num_requests_waiting.set(self.num_waiting)
        self._metrics.num_requests_running.set(self.num_running)
        if self.num_waiting or self.num_running:
            self._is_idle.clear()
        else:
            self._is_idle.set()
