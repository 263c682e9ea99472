"""The watchdog counts the silence of a busy worker, and not the time in which this process itself could hear nothing."""

from __future__ import annotations

import pytest

from server.engine_client.watchdog import Watchdog


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(clock: Clock) -> Watchdog:
    return Watchdog(10.0, clock)


def ticks(watchdog: Watchdog, clock: Clock, count: int, seconds: float = 1.0) -> list[bool]:
    """Return what each of some ticks decides."""
    decided = []
    for _ in range(count):
        clock.now += seconds
        decided.append(watchdog.tick(0.0))
    return decided


def test_a_silent_worker_has_stalled_after_the_timeout(watchdog: Watchdog, clock: Clock) -> None:
    assert ticks(watchdog, clock, 11) == [False] * 10 + [True]


def test_a_timeout_shorter_than_a_tick_is_noticed_soon(clock: Clock) -> None:
    watchdog = Watchdog(1.0, clock)
    assert watchdog.interval == 0.25
    assert ticks(watchdog, clock, 5, 0.25) == [False] * 4 + [True]


def test_progress_starts_the_count_again(watchdog: Watchdog, clock: Clock) -> None:
    for _ in range(5):
        assert not any(ticks(watchdog, clock, 9))
        watchdog.progress()
    clock.now += 0.5
    assert watchdog.silence == 0.5
    watchdog.progress(age=3.0)
    assert watchdog.silence == 3.0


@pytest.mark.parametrize("seconds", [3.0, 3600.0])
def test_time_in_which_this_process_was_stopped_is_not_the_workers(
    watchdog: Watchdog, clock: Clock, seconds: float
) -> None:
    assert not any(ticks(watchdog, clock, 4))
    clock.now += seconds
    assert watchdog.silence == 6.0
    assert not watchdog.tick(0.0)
    assert ticks(watchdog, clock, 5) == [False] * 4 + [True]


def test_a_late_tick_decides_nothing_because_messages_may_wait(watchdog: Watchdog, clock: Clock) -> None:
    assert not any(ticks(watchdog, clock, 10))
    assert ticks(watchdog, clock, 3, 60.0) == [False] * 3
    watchdog.progress()  # read from the socket before the next tick
    assert not any(ticks(watchdog, clock, 9))


@pytest.mark.parametrize(("waited", "counted"), [(0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.25), (5.0, 0.25)])
def test_little_counts_of_the_time_in_which_the_worker_waited_for_a_processor(
    watchdog: Watchdog, clock: Clock, waited: float, counted: float
) -> None:
    decided: list[bool] = []
    while not any(decided):
        clock.now += 1.0
        decided.append(watchdog.tick(waited))
    assert len(decided) == int(10 / counted) + 1
