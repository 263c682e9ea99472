"""Processors in simulated time: a machine per replica, or cores that several replicas share."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count
from typing import Any, Protocol

from simpy import Environment, Event


class Processors(Protocol):
    """The hardware that takes time to compute."""

    def compute(self, seconds: float) -> Event:
        """Return the event that work of so many seconds on an idle core is done."""
        ...


class PrivateProcessors:
    """A machine for each replica, so that work takes its own time."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def compute(self, seconds: float) -> Event:
        return self._environment.timeout(seconds)


class SharedProcessors:
    """Cores that all processes share equally: with more processes than cores, each is slower in proportion."""

    def __init__(self, environment: Environment, num_cores: float) -> None:
        self._environment = environment
        self._num_cores = num_cores
        self._work = 0.0  # that each process has done that has run from the beginning
        self._updated = 0.0
        self._ends: list[tuple[float, int, Event]] = []  # the value of `_work` at which a process ends
        self._numbers = count()
        self._num_changes = 0

    def compute(self, seconds: float) -> Event:
        self._advance()
        done = self._environment.event()
        heappush(self._ends, (self._work + seconds, next(self._numbers), done))
        self._set_timer()
        return done

    @property
    def speed(self) -> float:
        """The seconds of work per second of each process."""
        return min(1.0, self._num_cores / len(self._ends)) if self._ends else 0.0

    def _advance(self) -> None:
        now = self._environment.now
        self._work += self.speed * (now - self._updated)
        self._updated = now

    def _set_timer(self) -> None:
        """Wake up when the next process ends, unless another one begins or ends before."""
        self._num_changes += 1
        if self._ends:
            seconds = max(self._ends[0][0] - self._work, 0.0) / self.speed
            timer: Any = self._environment.timeout(seconds, self._num_changes)
            timer.callbacks.append(self._wake)

    def _wake(self, timer: Event) -> None:
        if timer.value != self._num_changes:
            return
        self._advance()
        end, _, done = heappop(self._ends)
        self._work = end  # exactly, whatever was rounded
        done.succeed()
        self._set_timer()
