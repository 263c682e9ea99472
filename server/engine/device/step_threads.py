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

# the seconds of steps between two looks at the threads, for each thread: a look reads a file of each
LOOK_SECONDS = 0.01
# A thread is delayed if it waits for its processor for a larger share of the time. On a quiet machine, threads wait for up
# to a tenth, and next to a program of the same priority for two thirds. Next to a decode process, which has a lower
# priority, it is a third: a step with all threads takes as long as one with one thread less.
MAX_WAIT_SHARE = 0.3
# seconds for which threads are left out, which double if threads are delayed when all are tried again
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
# the least pause, relative to the time in which delayed threads were noticed: a trial of all threads costs as much
PAUSE_PER_LOOK = 10


class StepThreads:
    """Sets the number of torch's threads for blocks that run a step each, from the waits of threads in earlier blocks.

    The number stays after a block, because torch takes long to change it. Waits between blocks count, although the time
    between blocks does not: threads stay awake for milliseconds after a block. `find_files` returns a file per thread, as
    `schedule_files` does. Without files, the number stays the same.
    """

    def __init__(
        self, find_files: Callable[[], Sequence[Path]] = tuple, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.number = self.num_all = torch.get_num_threads()
        self._find_files, self._clock = find_files, clock
        self._files = find_files()
        self._look_seconds = LOOK_SECONDS * self.num_all
        self._pause = FIRST_PAUSE
        self._until = -inf  # the number stays the same until this time
        self._began = 0.0  # of the block
        self._seconds = 0.0  # of blocks since the last look
        self._waits: list[float] = []  # of the threads at the last look
        self._restart()

    def __enter__(self) -> None:
        self._began = self._clock()
        if self.number < self.num_all and self._began >= self._until:
            self._use_all()
        if self._files and torch.get_num_threads() != self.number:
            torch.set_num_threads(self.number)

    def __exit__(self, *_: object) -> None:
        now = self._clock()
        self._seconds += now - self._began
        if self._files and self._seconds >= self._look_seconds:
            self._look(now)

    def _look(self, now: float) -> None:
        seconds, waits = self._seconds, self._read_waits()
        num_delayed = self._num_delayed(waits)
        self._seconds, self._waits = 0.0, waits or self._read_waits()
        if num_delayed is None:
            return
        if self.number < self.num_all:
            if num_delayed:  # even those that are left: fewer threads do not help
                self._use_all()
                self._until = now + max(LONGEST_PAUSE, PAUSE_PER_LOOK * seconds)
        elif not num_delayed:
            self._pause = FIRST_PAUSE
        elif now >= self._until:
            # at least half: on a shared machine all may be delayed
            self.number = max((self.num_all + 1) // 2, self.num_all - num_delayed)
            self._until = now + max(self._pause, PAUSE_PER_LOOK * seconds)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _num_delayed(self, waits: Sequence[float]) -> int | None:
        """Return the number of delayed threads in use from their waits, None if it is unknown.

        The first thread does not count: it runs every step.
        """
        if not waits or not self._waits:
            return None
        pairs = zip(waits[1 : self.number], self._waits[1:], strict=False)
        return sum(now - before > MAX_WAIT_SHARE * self._seconds for now, before in pairs)

    def _use_all(self) -> None:
        self._find_all()
        self._restart()

    def _find_all(self) -> None:
        # the OpenMP runtime has ended threads that were left out, and starts others
        torch.set_num_threads(self.num_all)
        self.number, self._files = self.num_all, self._find_files()

    def _restart(self) -> None:
        self._seconds, self._waits = 0.0, self._read_waits()

    def _read_waits(self) -> list[float]:
        """Return the seconds for which each thread in use has waited for its processor so far.

        If one has ended, return none, use all threads, and find them again.
        """
        try:
            return [int(file.read_text().split()[1]) / 1e9 for file in self._files[: self.number]]
        except OSError:
            if self.number < self.num_all:
                self._until = -inf
            self._find_all()
            return []


def schedule_files() -> list[Path]:
    """Return the files in which Linux counts the times of each of torch's threads; none elsewhere, or for one thread."""
    numbers = thread_ids() if sys.platform == "linux" else []
    files = [Path(f"/proc/self/task/{number}/schedstat") for number in numbers]
    return files if len(files) > 1 and all(map(Path.is_file, files)) else []
