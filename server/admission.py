"""Admission control: requests are counted on acceptance, before their body is read, so refusing one costs little.

A request holds a ticket until its last byte is sent. The ticket waits until the engine begins the prompt, then it runs.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from server.errors import Overloaded, ShuttingDown
from server.metrics import Metrics


class Ticket:
    """Counts one request as waiting, then as running; a context manager around all work of the request."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._is_waiting = True

    def started(self) -> None:
        """Count the request as running: the engine has begun its prompt."""
        if self._is_waiting:
            self._is_waiting = False
            self._admission.adjust(waiting=-1, running=1)

    def __enter__(self) -> Ticket:
        self._admission.adjust(waiting=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.adjust(waiting=-1) if self._is_waiting else self._admission.adjust(running=-1)


class Admission:
    """Counts waiting and running requests, and refuses further ones when the queue is full."""

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
        """Return a ticket. Raises `Overloaded` if the queue is full, and `ShuttingDown`."""
        if self.is_closed:
            raise ShuttingDown("the server is shutting down")
        if self.is_full:
            raise Overloaded(f"{self.num_waiting} requests are waiting, the limit is {self._max_num_queued}")
        return Ticket(self)

    def close(self) -> None:
        self.is_closed = True

    async def wait_until_idle(self) -> None:
        """Return when no request is waiting or running."""
        await self._is_idle.wait()

    def adjust(self, *, waiting: int = 0, running: int = 0) -> None:
        self.num_waiting += waiting
        self.num_running += running
        self._metrics.num_requests_waiting.set(self.num_waiting)
        self._metrics.num_requests_running.set(self.num_running)
        if self.num_waiting or self.num_running:
            self._is_idle.clear()
        else:
            self._is_idle.set()
