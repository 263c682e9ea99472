"""The seconds that steps take and may take: a request that arrives meanwhile waits for the step to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

from server.engine.shares import Shares, work_of

# The time of heavy sequences relative to that of light ones, which should take at most three times as long as alone. Also
# the time of side work relative to that of all sequences.
SHARE_BESIDE = 1 / 3
# the most seconds that they owe, after a call that compiles kernels or a pause of the machine
MAX_DEBT = 2.0
# the smallest piece of a prompt, unless a step with it takes too long
MIN_PIECE = 16
# A server with one request at a time takes longer steps, which a CPU computes more efficiently. A second request waits for
# one such step; after it, steps are short for LONE_SECONDS.
LONE_STEPS = 4.0
LONE_SECONDS = 2.0
# Steps that only encode media are shorter, since any request that arrives waits for one.
MEDIA_STEPS, LONE_MEDIA_STEPS = 0.5, 1.0


class Pace:
    """An estimate of a step's seconds, from its work and its frames, that learns from each step.

    It is a normalised least-mean-squares filter: cheap, and a step that a busy machine delays changes it little. An error
    corrects mostly the fixed part if the step has less work than WORK_SCALE, else the time per unit of work. If errors of
    short steps corrected the latter, steps would become shorter still, and the fixed part would never be learnt.
    """

    RISE, FALL = 0.25, 0.5
    MAX_SURPRISE = 3.0
    WORK_SCALE = 64.0

    def __init__(self, usual: float = inf, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin without steps. `usual` is the longest time of a step, in seconds, while there are several requests."""
        self._usual = usual
        self._clock = clock
        self.forget()

    def forget(self) -> None:
        """Forget how long steps have taken, and when there were two requests."""
        self.fixed = self.per_work = self.per_frame = 0.0
        self._met = -inf  # the last time at which there were two requests

    def smallest_piece(self, seconds: float, context: int) -> int:
        """Return the smallest length of a piece of a prompt; shorter where a step with it takes longer than `seconds`.

        The piece follows `context` other tokens. Short pieces read these, and the weights, more often.
        """
        return MIN_PIECE if self.fixed + work_of(MIN_PIECE, context) * self.per_work <= seconds else MIN_PIECE // 2

    def learn(self, work: float, num_frames: int, seconds: float) -> None:
        """Learn from a step. One that only encodes frames has no fixed part, since it does not read the decoder.

        The first error corrects the estimates by all of it, and that of the first frames their time alone.
        """
        scaled, has_rows = work / self.WORK_SCALE, work > 0
        expected = has_rows * self.fixed + work * self.per_work + num_frames * self.per_frame
        if num_frames and not self.per_frame and seconds > expected:
            self.per_frame = (seconds - expected) / num_frames
            return
        if expected:
            seconds = min(seconds, self.MAX_SURPRISE * expected)
        error = seconds - expected
        gain = 1.0 if not expected else self.RISE if error > 0 else self.FALL
        step = gain * error / (has_rows + scaled * scaled + num_frames * num_frames)
        self.fixed = max(self.fixed + has_rows * step, 0.0)
        self.per_work = max(self.per_work + step * scaled / self.WORK_SCALE, 0.0)
        self.per_frame = max(self.per_frame + step * num_frames, 0.0)
        if has_rows:  # a step that took less than the fixed part shows that this is too large
            self.fixed = min(self.fixed, seconds)

    def note_requests(self, shares: Shares) -> None:
        if shares.expects_others:
            self._met = self._clock()

    def longest(self) -> float:
        """Return the longest time of a step, in seconds: at least twice the fixed part, as all limits here."""
        return self._seconds(LONE_STEPS if self._is_alone() else 1.0)

    def longest_of_media(self) -> float:
        """Return the longest time of a step that only encodes media."""
        return self._seconds(LONE_MEDIA_STEPS if self._is_alone() else MEDIA_STEPS)

    def longest_without_turns(self) -> float:
        """Return the time below which turns of the sequences would gain nothing."""
        return self._seconds(1 / 4)

    def _seconds(self, factor: float) -> float:
        return max(factor * self._usual, 2 * self.fixed)

    def _is_alone(self) -> bool:
        return self._clock() - self._met >= LONE_SECONDS
