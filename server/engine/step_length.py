"""The longest time of a step: a request that arrives meanwhile waits for the step to end."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from server.engine.shares import Shares

# A server that has one request at a time takes longer steps, which cost a CPU less: the first request that arrives next to
# another one waits for one such step, and ends them for as many seconds.
LONE_STEPS = 4.0
LONE_SECONDS = 2.0
# Steps that only encode media are shorter, since any request that arrives waits for one.
MEDIA_STEPS, LONE_MEDIA_STEPS = 0.5, 1.0


class StepLength:
    """The longest time of a step, in seconds, from the usual one: at least twice that of reading the weights, `fixed`."""

    def __init__(self, usual: float, clock: Callable[[], float]) -> None:
        self._usual = usual
        self._clock = clock
        self._met = -inf  # the last time at which there were two requests

    def note_requests(self, shares: Shares) -> None:
        if shares.expects_others:
            self._met = self._clock()

    def forget(self) -> None:
        """Forget that two requests met."""
        self._met = -inf

    def of_rows(self, fixed: float) -> float:
        factor = LONE_STEPS if self._is_alone() else 1.0
        return max(factor * self._usual, 2 * fixed)

    def of_media(self, fixed: float) -> float:
        """Return the longest time of a step that only encodes media."""
        factor = LONE_MEDIA_STEPS if self._is_alone() else MEDIA_STEPS
        return max(factor * self._usual, 2 * fixed)

    def without_turns(self, fixed: float) -> float:
        """Return the time below which turns of the sequences would gain nothing."""
        return max(self._usual / 4, 2 * fixed)

    def _is_alone(self) -> bool:
        return self._clock() - self._met >= LONE_SECONDS
