"""Limits the rate at which large bodies are read while requests wait or run, because receiving a body uses processor time.

Reading gives way as parsing does (see `resting_lock`). What a client sends meanwhile stays in its connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# of all large bodies together; on a slow core they then take about a sixth of its time
BYTES_PER_SECOND = 32 * 2**20
# pieces of a body are small: their times add up to one that is worth a pause
MIN_PAUSE = 0.02


class BodyRate:
    """Counts the bytes that are read, and says how long to pause so that the rate is kept."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due = 0.0  # when the bytes so far are read at this rate

    def pause(self, num_bytes: int) -> float:
        """Count bytes, and return the seconds to wait before the next ones are read, 0 for a short time."""
        now = self._clock()
        self._due = max(self._due, now) + num_bytes / BYTES_PER_SECOND
        seconds = self._due - now
        return seconds if seconds >= MIN_PAUSE else 0.0
