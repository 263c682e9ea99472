"""Leaves out threads of a step on a CPU while other programs use their processors.

The threads of a step wait for each other at dozens of points. If one of them waits for its processor, so do all, and the
step takes several times as long as with fewer threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kernels.threads import thread_ids

# the time of steps between two looks at the threads
LOOK_SECONDS = 0.02
# A thread that waits for its processor for a larger share of a step is left out. Alone on a machine, threads wait for up to
# a tenth, next to a decode process of a lower priority for a third, and next to an equal program for two thirds.
MAX_WAIT_SHARE = 0.3
# seconds until all threads are tried again, which double while they still wait
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0


class StepThreads:
    """Sets the number of torch's threads for a block that computes a step, from the waits of the threads in steps before.

    `files` are those of `schedule_files`. Without any, the number stays the same.
    """

    def __init__(
        self,
        files: Sequence[Path] = (),
        clock: Callable[[], float] = time.perf_counter,
        use: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        self.number = self._all = torch.get_num_threads()
        self._files, self._clock, self._use = files, clock, use
        self._pause, self._until = FIRST_PAUSE, 0.0
        self._began = self._seconds = 0.0
        self._waits = self._read_waits()

    def __enter__(self) -> None:
        self._began = self._clock()
        if self.number < self._all and self._began >= self._until:
            self.use_all()

    def __exit__(self, *_: object) -> None:
        self._seconds += self._clock() - self._began
        if self._files and self._seconds >= LOOK_SECONDS:
            self._look()

    def use_all(self) -> None:
        """Use all threads, until they have waited."""
        self._set(self._all)
        self._seconds, self._waits = 0.0, self._read_waits()

    def _look(self) -> None:
        """Leave out as many threads as have waited, but at most half of them: on a shared machine all may have waited.

        The first thread computes every step, so its waits do not matter.
        """
        waits, most = self._read_waits(), MAX_WAIT_SHARE * self._seconds
        num_delayed = sum(now - before > most for now, before in zip(waits[1:], self._waits[1:], strict=True))
        self._seconds, self._waits = 0.0, waits
        if num_delayed:
            self._set(max(self.number // 2, self.number - num_delayed, 1))
            self._until = self._clock() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif self.number == self._all:
            self._pause = FIRST_PAUSE

    def _set(self, number: int) -> None:
        self.number = number
        self._use(number)

    def _read_waits(self) -> list[float]:
        """Return the seconds for which each thread has waited for its processor so far."""
        return [int(file.read_text().split()[1]) / 1e9 for file in self._files]


def schedule_files() -> list[Path]:
    """Return the files in which Linux counts the times of each of torch's threads; none elsewhere, or for one thread."""
    files = [Path(f"/proc/self/task/{number}/schedstat") for number in thread_ids()]
    return files if len(files) > 1 and all(map(Path.is_file, files)) else []
