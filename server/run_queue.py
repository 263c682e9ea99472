"""Measures how long the threads of a process wait for a processor, with the scheduler's statistics of Linux."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


class RunQueue:
    """The time for which the threads of a process could run, but another thread had the processor."""

    def __init__(self, pid: int) -> None:
        self._threads = Path(f"/proc/{pid}/task")
        self._waits = self._read()

    def take_wait(self) -> float:
        """Return the seconds that the thread which waited longest has waited since the last call.

        0.0 where the system does not have these statistics.
        """
        before, self._waits = self._waits, self._read()
        return max((wait - before.get(thread, wait) for thread, wait in self._waits.items()), default=0) / 1e9

    def _read(self) -> dict[str, int]:
        """Return the nanoseconds that each thread has waited so far."""
        waits = {}
        with suppress(OSError):  # the process has ended
            for thread in self._threads.iterdir():
                with suppress(OSError, IndexError):  # the thread has ended
                    waits[thread.name] = int((thread / "schedstat").read_text(encoding="ascii").split()[1])
        return waits
