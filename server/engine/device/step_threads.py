"""Leaves out threads of steps on a CPU while other programs use their processors.

The threads of a step wait for each other at dozens of points. If one of them waits for its processor, so do all, and the
step takes several times as long as with fewer threads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

import torch

from kernels.threads import thread_ids

# the seconds between two looks at the threads, for each thread: a look reads a file of each
LOOK_SECONDS = 0.01
# A thread is delayed if it waits for its processor for a larger share of the time. On a quiet machine, threads wait for up
# to a tenth, and next to a program of the same priority for two thirds. Next to a decode process, which has a lower
# priority, it is a third: a step with all threads takes as long as one with one thread less.
MAX_WAIT_SHARE = 0.3
# seconds for which threads are left out, which double if threads are delayed when all are tried again
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0


class StepThreads:
    """Sets the number of torch's threads for a block that runs a step, from the waits of the threads until then.

    `find_files` returns a file per thread, as `schedule_files` does. Without files, the number stays the same.
    """

    def __init__(
        self, find_files: Callable[[], Sequence[Path]] = tuple, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.all = self.number = torch.get_num_threads()
        self._find_files, self._clock = find_files, clock
        self._files = find_files()
        self._look_seconds = LOOK_SECONDS * self.all
        self._pause = FIRST_PAUSE
        self._until = -inf  # the number stays the same until this time
        self._began = self._ended = -inf  # of the steps since the last look
        self._waits: list[float] = []

    def __enter__(self) -> None:
        if not self._files:
            return
        now = self._clock()
        if self.number < self.all and now >= self._until:
            self.number, self._files = self.all, self._find_files()
            self._restart(now)
        elif now - self._ended > self._look_seconds:  # threads may have waited in other work
            self._restart(now)
        if self.number < self.all:
            torch.set_num_threads(self.number)

    def __exit__(self, *_: object) -> None:
        if not self._files:
            return
        if self.number < self.all:
            torch.set_num_threads(self.all)
        self._ended = self._clock()
        if self._ended - self._began >= self._look_seconds:
            self._look(self._ended)

    def _look(self, now: float) -> None:
        num_delayed = self._num_delayed(now - self._began)
        self._restart(now)
        if self.number < self.all:
            if num_delayed:  # the others are delayed as well, so it does not help
                self.number, self._files = self.all, self._find_files()
                self._until = now + LONGEST_PAUSE
                self._restart(now)
        elif not num_delayed:
            self._pause = FIRST_PAUSE
        elif now >= self._until:
            # not less than half: on a shared machine all may be delayed
            self.number = max(self.all // 2, self.all - num_delayed)
            self._until, self._pause = now + self._pause, min(2 * self._pause, LONGEST_PAUSE)

    def _num_delayed(self, seconds: float) -> int:
        """Return the number of delayed threads in use. The first one does not count: it runs every step."""
        waited = [now - before for now, before in zip(self._read_waits(), self._waits, strict=False)]
        return sum(wait > MAX_WAIT_SHARE * seconds for wait in waited[1 : self.number])

    def _restart(self, now: float) -> None:
        self._began, self._waits = now, self._read_waits()

    def _read_waits(self) -> list[float]:
        """Return the seconds for which each thread has waited for its processor so far; none if a thread has ended."""
        try:
            # the OpenMP runtime ends threads that are left out
            return [int(file.read_text().split()[1]) / 1e9 for file in self._files[: self.number]]
        except OSError:
            self._files = self._find_files()
            return []


def schedule_files() -> list[Path]:
    """Return the files in which Linux counts the times of each of torch's threads; none elsewhere, or for one thread."""
    numbers = thread_ids() if sys.platform == "linux" else []
    files = [Path(f"/proc/self/task/{number}/schedstat") for number in numbers]
    return files if len(files) > 1 and all(map(Path.is_file, files)) else []
