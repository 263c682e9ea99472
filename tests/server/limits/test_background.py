"""Next to clients, work in the background runs in turns and rests; without them, it runs together and at once."""

from __future__ import annotations

import asyncio

import pytest

from server.limits.admission import QUIET_SECONDS, Admission
from server.limits.background import Background
from server.telemetry.metrics import Metrics
from tests.server.fakes import eventually

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Pieces:
    """Pieces of work that begin in the background, and end, after `seconds` of the clock, when they may."""

    def __init__(self, admission: Admission, clock: Clock) -> None:
        self.begun = 0
        self.tasks: list[asyncio.Task[None]] = []
        self._background = Background(admission, clock)
        self._clock = clock
        self._may_end = asyncio.Semaphore(0)
        self._seconds = 0.0

    def add(self, count: int) -> None:
        self.tasks += [asyncio.create_task(self._background.run(self._work)) for _ in range(count)]

    def let_one_end(self, seconds: float) -> None:
        self._seconds = seconds
        self._may_end.release()

    async def _work(self) -> None:
        self.begun += 1
        await self._may_end.acquire()
        self._clock.now += self._seconds

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    return Admission(4, Metrics("tiny"), clock=clock)


@pytest.fixture
def pieces(admission: Admission, clock: Clock) -> Pieces:
    return Pieces(admission, clock)


async def settle() -> None:
    """Let everything run that could run now."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_without_clients_work_runs_together_and_without_rest(pieces: Pieces) -> None:
    pieces.add(3)
    await settle()
    assert pieces.begun == 3
    pieces.let_one_end(seconds=100.0)
    pieces.add(1)
    await settle()
    assert pieces.begun == 4
    await pieces.end()


async def test_next_to_clients_one_piece_runs_at_a_time_and_rests(
    pieces: Pieces, admission: Admission, clock: Clock
) -> None:
    with admission.ticket("client") as ticket:
        ticket.wait()
        pieces.add(3)
        await eventually(lambda: pieces.begun == 1)
        await settle()
        assert pieces.begun == 1  # the others wait for their turn
        pieces.let_one_end(seconds=100.0)
        await settle()
        assert (pieces.begun, sum(task.done() for task in pieces.tasks)) == (1, 1)  # it rests
    clock.now += QUIET_SECONDS
    await eventually(lambda: pieces.begun == 2)  # the client has disconnected: the rest ends
    await pieces.end()


async def test_next_to_clients_work_advances(pieces: Pieces, admission: Admission) -> None:
    with admission.ticket("client") as ticket:
        ticket.wait()
        pieces.add(3)
        for begun in (1, 2, 3):
            await eventually(lambda begun=begun: pieces.begun == begun)  # type: ignore[misc]
            pieces.let_one_end(seconds=0.01)
        await asyncio.gather(*pieces.tasks)


async def test_a_pause_between_two_requests_is_not_quiet(admission: Admission, clock: Clock) -> None:
    for _ in range(2):
        with admission.ticket("client") as ticket:
            ticket.wait()
        clock.now += QUIET_SECONDS / 2
        with admission.ticket("client"):
            pass  # a request without a body, such as a probe, changes nothing
    waiting = asyncio.create_task(admission.wait_until_quiet())
    await settle()
    assert not waiting.done()
    clock.now += QUIET_SECONDS
    await asyncio.wait_for(waiting, 20)
    assert admission.is_quiet
