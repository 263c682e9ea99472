"""Shares a few resources between clients, which take turns, however many requests and media of each are waiting.

The client whose last turn was longest ago is next, with that of its requests whose last turn was longest ago. A new client
or request is treated as if its last turn was `NEWCOMER_LEAD` turns ago: it precedes those that have just had a turn, but
new ones cannot block them for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

from server.limits.turns import client_in_turn

NEWCOMER_LEAD = 64
# short jobs of a client that must end before its jobs are expected to be short again
NUM_SHORT = 16
# seconds after its last turn in which a client is expected to have another job soon
RECENT_SECONDS = 10.0

Resource = TypeVar("Resource")


class Turn(NamedTuple):
    """A client's last turn: the number of turns of all clients until then, and its time."""

    number: int
    time: float


@dataclass(slots=True, eq=False)
class Tally:
    """A total over media, each of which counts once, however often it is decoded."""

    _total: int = 0
    _by_digest: dict[bytes, int] = field(default_factory=dict)

    def without(self, digest: bytes) -> int:
        """Return the total of all other media."""
        return self._total - self._by_digest.get(digest, 0)

    def record(self, digest: bytes, count: int) -> None:
        self._total = self.without(digest) + count
        self._by_digest[digest] = count


class NoTally(Tally):
    """The tally of a request whose media count separately, as if each were sent alone."""

    def record(self, digest: bytes, count: int) -> None:
        pass


@dataclass(slots=True, eq=False)
class Requester:
    """A request that needs media decoded, and the sizes of those that were. It has no turns while it is paused.

    Its client is by default that of the current request.
    """

    pixels: Tally = field(default_factory=Tally)
    frame_bytes: Tally = field(default_factory=Tally)
    is_paused: bool = False
    client: str = field(default_factory=client_in_turn.get)
    last_turn: int | None = None


class Job:
    """The decoding of one media item, for every request that needs it.

    `is_long`: it may take seconds. `is_slow`: it has taken longer than a short job.
    """

    def __init__(self, *requesters: Requester) -> None:
        self.requesters = set(requesters)
        self.is_long = False
        self.is_slow = False
        self._queue: DecodeTurns[Any] | None = None

    @property
    def clients(self) -> set[str]:
        return {requester.client for requester in self.requesters}

    def pixels_before(self, digest: bytes) -> int:
        """Return the pixels of the other media that were decoded for the same request; the minimum over its requests."""
        return min((requester.pixels.without(digest) for requester in self.requesters), default=0)

    def frame_bytes_before(self, digest: bytes) -> int:
        """Return the bytes of the other media's frames for the same request; the minimum over its requests."""
        return min((requester.frame_bytes.without(digest) for requester in self.requesters), default=0)

    def add(self, requester: Requester) -> None:
        """Add a request that needs the media item: its turns are used, too."""
        self.requesters.add(requester)
        if self._queue is not None:
            self._queue.enter(self, requester)

    def discard(self, requester: Requester) -> None:
        self.requesters.discard(requester)
        if self._queue is not None:
            self._queue.leave(self, requester)

    def wait_in(self, queue: DecodeTurns[Any] | None) -> None:
        """Enter a queue for all requests of the job, or leave the current one."""
        if self._queue is not None:
            for requester in self.requesters:
                self._queue.leave(self, requester)
        self._queue = queue
        if queue is not None:
            for requester in self.requesters:
                queue.enter(self, requester)


class DecodeTurns(Generic[Resource]):
    """Lends resources, each to one job at a time; the last returned one is lent first.

    One of several resources is never lent to a long job, so that short jobs need not wait for long ones. A job that turns
    out slow is long, and so are its client's other jobs, until `NUM_SHORT` of them have turned out short, or the client has
    no job waiting and has had no turn among the last `NEWCOMER_LEAD`.

    The last idle resource is not lent to a client with a short job on another one, if a client without such a job has had
    a turn in the last seconds: its next job finds the resource idle.
    """

    def __init__(self, resources: Iterable[Resource], clock: Callable[[], float] = time.monotonic) -> None:
        self._idle = list(resources)
        self._clock = clock
        self._num_for_long = max(len(self._idle) - 1, 1)
        self._lent: dict[Resource, Job] = {}
        self._lent_for_long: set[Resource] = set()
        self._waiting: dict[Requester, dict[Job, None]] = {}
        self._granted: dict[Job, asyncio.Future[Resource]] = {}
        self._slow_clients: dict[str, int] = {}  # the number of short jobs that must end first
        self._last_turns: dict[str, Turn] = {}  # of the clients that wait or have had one lately
        self._num_turns = 0

    async def take(self, job: Job, *, is_long: bool = False) -> Resource:
        """Return a resource when it is the job's turn; `give_back` must follow."""
        job.is_long = is_long
        granted = self._granted[job] = asyncio.get_running_loop().create_future()
        job.wait_in(self)
        self.grant()
        try:
            return await granted
        except asyncio.CancelledError:
            job.wait_in(None)
            if not granted.cancelled():  # both happened at once
                self.give_back(granted.result())
            raise
        finally:
            del self._granted[job]

    def give_back(self, resource: Resource) -> None:
        self._idle.append(resource)
        del self._lent[resource]
        self._lent_for_long.discard(resource)
        self.grant()

    def try_to_keep(self, resource: Resource, job: Job) -> bool:
        """Note that a job turned out slow, and return whether it keeps its resource.

        It does as a long job, if another one may run, and otherwise while no other client waits for the resource.
        """
        job.is_slow = True
        self._slow_clients |= dict.fromkeys(job.clients, NUM_SHORT)
        if resource in self._lent_for_long or len(self._lent_for_long) < self._num_for_long:
            job.is_long = True
            self._lent_for_long.add(resource)
            self.grant()  # the client has one short job less
        return job.is_long or not any(
            requester.client not in job.clients and not requester.is_paused and self._is_short(other)
            for requester, jobs in self._waiting.items()
            for other in jobs
            if not self._is_cancelled(other)
        )

    def record_end(self, job: Job) -> None:
        """Record that a job has ended and has not been cancelled."""
        if job.is_long or job.is_slow:
            return
        for client in self._slow_clients.keys() & job.clients:
            self._slow_clients[client] -= 1
            if not self._slow_clients[client]:
                del self._slow_clients[client]
        self.grant()

    def enter(self, job: Job, requester: Requester) -> None:
        newcomer = self._num_turns - NEWCOMER_LEAD
        if requester.last_turn is None:
            requester.last_turn = newcomer
        self._last_turns.setdefault(requester.client, Turn(newcomer, -inf))
        self._waiting.setdefault(requester, {})[job] = None

    def leave(self, job: Job, requester: Requester) -> None:
        jobs = self._waiting.get(requester, {})
        jobs.pop(job, None)
        if not jobs:
            self._waiting.pop(requester, None)

    def grant(self) -> None:
        """Lend idle resources, if any.

        To be called when a requester is no longer paused, when a job has other requesters, and from time to time while jobs
        run: a client for which a resource is kept may not come again.
        """
        while self._idle and (job := self._next()) is not None:
            job.wait_in(None)
            resource = self._idle.pop()
            self._lent[resource] = job
            if not self._is_short(job):
                self._lent_for_long.add(resource)
            self._granted[job].set_result(resource)

    def _next(self) -> Job | None:
        kept_from = self._kept_from()
        ready = [
            ((self._last_turns[requester.client].number, requester.last_turn or 0), job)
            for requester, jobs in self._waiting.items()
            if not requester.is_paused
            and requester.client not in kept_from
            and (job := next(filter(self._may_run, jobs), None)) is not None
        ]
        if not ready:
            return None
        _, job = min(ready, key=itemgetter(0))
        self._num_turns += 1
        turn = Turn(self._num_turns, self._clock())
        for sharer in job.requesters:
            sharer.last_turn = turn.number
            self._last_turns[sharer.client] = turn
        self._forget()
        return job

    def _forget(self) -> None:
        """Treat the clients that would precede new ones as new, and forget them if they have had no turn for seconds."""
        newcomer = self._num_turns - NEWCOMER_LEAD
        known = {requester.client for requester in self._waiting}
        known |= {client for client, turn in self._last_turns.items() if turn.number > newcomer}
        self._slow_clients = {client: number for client, number in self._slow_clients.items() if client in known}
        recent = self._recent_clients()
        self._last_turns = {
            client: turn if client in known else turn._replace(number=newcomer)
            for client, turn in self._last_turns.items()
            if client in known or client in recent
        }

    def _recent_clients(self) -> set[str]:
        """Return the clients that have had a turn in the last seconds."""
        since = self._clock() - RECENT_SECONDS
        return {client for client, turn in self._last_turns.items() if turn.time >= since}

    def _kept_from(self) -> set[str]:
        """Return the clients to which the last idle resource is not lent."""
        if len(self._idle) > 1:
            return set()
        short = [job for resource, job in self._lent.items() if resource not in self._lent_for_long]
        clients = set[str]().union(*(job.clients for job in short))
        return clients if self._recent_clients() - clients else set()

    def _may_run(self, job: Job) -> bool:
        has_room = len(self._lent_for_long) < self._num_for_long
        return not self._is_cancelled(job) and (has_room or self._is_short(job))

    def _is_cancelled(self, job: Job) -> bool:
        """Return whether a waiting job is cancelled: it leaves the queue in an iteration of the event loop."""
        return self._granted[job].done()

    def _is_short(self, job: Job) -> bool:
        return not (job.is_long or job.clients <= self._slow_clients.keys())
