"""Admission control: a request enters the queue when its body has arrived; clients share the queue.

A request holds its ticket until the last byte of its response is sent. It waits until the engine begins its prompt, then it
runs, and then its response is sent, for as long as its client reads. Bodies of requests and responses are counted in bytes
while they are held. A request is refused with 503 if the server is full, with 429 if its client has its share.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal

from server.limits.pacing import Pacing
from server.limits.shared_limit import SharedLimit
from server.telemetry.metrics import Metrics

MAX_RETRY_AFTER = 60
# longer than the pauses of a client that sends one request after the other
QUIET_SECONDS = 0.1
# weight of the newest interval in the mean interval between the starts of requests
NEWEST = 0.1
# bytes per second of all large bodies while requests wait or run: they take about a sixth of a slow core
BYTES_PER_SECOND = 32 * 2**20
# pieces of a body are small: their times are added up until they are worth a pause
MIN_PAUSE = 0.02

State = Literal["arriving", "waiting", "running", "sending", "left"]


class BodyRate:
    """Counts the bytes of large bodies, and returns pauses that limit their rate.

    So reading leaves time for other requests, as parsing does (see `resting_lock`). Bytes sent meanwhile stay in the
    connection.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due = 0.0  # when the bytes so far are read at this rate

    def pause(self, num_bytes: int) -> float:
        """Count bytes, and return the seconds to wait before the next ones are read, 0 for a short time."""
        now = self._clock()
        self._due = max(self._due, now) + num_bytes / BYTES_PER_SECOND
        seconds = self._due - now
        return seconds if seconds >= MIN_PAUSE else 0.0


class Ticket:
    """The state of one request: its body arrives, it waits, it runs, its response is sent.

    A context manager around all work of the request. `num_bytes`: those of its bodies.
    """

    def __init__(self, admission: Admission, client: str) -> None:
        self.client = client
        self._admission = admission
        self.state: State = "left"  # until it is entered
        self.num_bytes = 0

    def check(self, *, waits: bool = True) -> None:
        """Check that the client reads its responses and, if the request `waits`, that it may do so now.

        Responses that were not refused may be more than the client's share of bodies. Raises `Overloaded` and
        `ClientOverShare`.
        """
        self._admission.bodies.check_held(self.client)
        if waits:
            self._admission.queue.check(self.client)

    def hold(self, num_bytes: int, *, is_unread: bool = True) -> None:
        """Count bytes of a body, if they are within the limits. Raises `Overloaded` and `ClientOverShare`.

        `is_unread`: the request's body is not read to its end yet, so a refusal closes the connection.
        """
        self._admission.bodies.check(self.client, num_bytes, closes=is_unread)
        self.count(num_bytes)

    def count(self, num_bytes: int) -> None:
        """Count bytes of a body until the ticket is released, also beyond the limits."""
        self._admission.bodies.take(self.client, num_bytes)
        self.num_bytes += num_bytes

    def pause(self, num_bytes: int) -> float:
        """Count bytes of a large body, and return the seconds to wait before reading more: other requests go first."""
        return 0.0 if self._admission.is_quiet else self._admission.body_rate.pause(num_bytes)

    def wait(self) -> None:
        """Count the request as waiting: its body is complete. Raises what `check` raises."""
        self.check()
        self._admission.move(self, "waiting")

    def started(self) -> None:
        """Count the request as running: the engine has begun its prompt, or the response is complete."""
        if self.state == "waiting":
            self._admission.move(self, "running")

    def answered(self) -> None:
        """Count the request as sending: it waits only for its client to read the response, which may take for ever.

        A refusal is sent after its ticket was released.
        """
        self.started()
        if self.state != "left":
            self._admission.move(self, "sending")

    def __enter__(self) -> Ticket:
        self._admission.move(self, "arriving")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.bodies.release(self.client, self.num_bytes)
        self.num_bytes = 0
        self._admission.move(self, "left")


class Admission:
    """Counts the waiting and running requests of all clients and the bytes of their bodies, within limits.

    `max_held` is the maximum number of delayed refusals.
    """

    def __init__(
        self,
        max_num_queued: int,
        metrics: Metrics,
        *,
        max_bytes: int = 2**30,
        max_share: float = 0.75,
        max_held: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_running = 0
        self.num_unfinished = 0  # in any of these states, or arriving
        self.is_closed = False
        self.pacing = Pacing(max_held, clock)
        self.queue = SharedLimit(max_num_queued, max_share, "requests that may wait", self.retry_after)
        self.bodies = SharedLimit(max_bytes, max_share, "bytes that bodies may take", self.retry_after)
        self.body_rate = BodyRate(clock)
        self._metrics = metrics
        self._clock = clock
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._idle_since = -math.inf
        self._seconds_per_start = 0.0
        self._waiting_since = 0.0  # the last start, or the time when the queue was empty last

    @property
    def num_waiting(self) -> int:
        return self.queue.used

    def ticket(self, client: str) -> Ticket:
        return Ticket(self, client)

    def close(self) -> None:
        self.is_closed = True
        self.pacing.close()

    async def wait_until_empty(self) -> None:
        """Wait until no request is arriving, waiting or running, and no response is being sent."""
        await self._is_empty.wait()

    @property
    def is_quiet(self) -> bool:
        """True if no request waits or runs, and none did a moment ago."""
        return self._is_idle.is_set() and self._quiet_in() <= 0

    async def wait_until_quiet(self) -> None:
        while not self.is_quiet:
            await self._is_idle.wait()
            await asyncio.sleep(max(self._quiet_in(), 0.0))

    def retry_after(self) -> int:
        """Return the seconds until the current queue is empty, at the rate at which requests have begun lately."""
        return min(max(math.ceil(self.queue.used * self._seconds_per_start), 1), MAX_RETRY_AFTER)

    def move(self, ticket: Ticket, state: State) -> None:
        """Count the request of a ticket in another state."""
        before, ticket.state = ticket.state, state
        now = self._clock()
        if state == "waiting":
            if not self.queue.used:
                self._waiting_since = now
            self.queue.take(ticket.client)
        elif before == "waiting":
            self.queue.release(ticket.client)
        if state == "running":
            self._seconds_per_start += NEWEST * (now - self._waiting_since - self._seconds_per_start)
            self._waiting_since = now
        self.num_running += (state == "running") - (before == "running")
        self.num_unfinished += (state == "arriving") - (state == "left")
        if self.num_unfinished:
            self._is_empty.clear()
        else:
            self._is_empty.set()
        self._metrics.num_requests_waiting.set(self.queue.used)
        self._metrics.num_requests_running.set(self.num_running)
        if self.queue.used or self.num_running:
            self._is_idle.clear()
        elif not self._is_idle.is_set():
            self._is_idle.set()
            self._idle_since = now

    def _quiet_in(self) -> float:
        return self._idle_since + QUIET_SECONDS - self._clock()
