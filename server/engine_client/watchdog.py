"""Detects a worker that hangs: one that is neither busy nor idle, while the API process itself was not suspended.

The time without progress is counted in ticks of the API process's own loop. A tick may be late because the loop was
blocked, the process or the machine was suspended, or the clock jumped. A late tick counts as a short one and never reports
a stall: messages that the worker sent meanwhile are read before the next tick. The time for which the worker waits for a
processor counts as a quarter: on a busy machine it makes progress, only slowly.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_TICK_SECONDS = 1.0
TICKS_PER_TIMEOUT = 4
# a tick is late if it takes this many times its interval
LATE = 2.0
# the share of the time that always counts: otherwise, a thread that waits for a processor would hide one that hangs
LEAST_SHARE = 1 / 4


class Watchdog:
    """Measures the time without progress of a worker that has work."""

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval = min(MAX_TICK_SECONDS, timeout / TICKS_PER_TIMEOUT)
        self._timeout = timeout
        self._clock = clock
        self._last = clock()
        self._silence = 0.0

    @property
    def silence(self) -> float:
        """Seconds without progress."""
        return self._silence + min(self._clock() - self._last, LATE * self.interval)

    def progress(self, age: float = 0.0) -> None:
        """Note that the worker made progress `age` seconds ago, or has no work."""
        self._last, self._silence = self._clock(), age

    def tick(self, waited: float) -> bool:
        """Count the time since the last tick, and return whether the worker has stalled.

        `waited`: the seconds of this time for which the worker waited for a processor.
        """
        is_late = self._clock() - self._last > LATE * self.interval
        elapsed = self.silence - self._silence
        self._silence, self._last = self._silence + max(elapsed - waited, LEAST_SHARE * elapsed), self._clock()
        return not is_late and self._silence > self._timeout
