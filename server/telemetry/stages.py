"""The stages of the request of the current context, and their times, for traces.

A request is in one stage at a time, from its first byte to the last byte of its response. Without tracing, the stages of
every request are `NO_STAGES`, which record nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

Stage = Literal["receive", "prepare", "queue", "prefill", "compute", "decode", "answer"]

# Stages follow in this order, and some are skipped: a request that generates has no `compute`, any other no `prefill` and
# no `decode`.
ORDER: dict[Stage, int] = {
    "receive": 0,
    "prepare": 1,
    "queue": 2,
    "prefill": 3,
    "compute": 3,
    "decode": 4,
    "answer": 5,
}


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval in which a request did or awaited something, from `began` to `ended` (`time.monotonic()`)."""

    name: str
    began: float
    ended: float
    attributes: Mapping[str, int] = field(default_factory=dict)

    def contains(self, other: Interval) -> bool:
        return self.began <= other.began and other.ended <= self.ended


class Stages:
    """The times of a request's stages, of `details` within them, and the `facts` of its log line."""

    def __init__(self, *, is_ended: bool = False) -> None:
        self.began = self.ended = time.monotonic()
        self.details: list[Interval] = []
        self.facts: dict[str, Any] = {}
        self._begins: list[tuple[Stage, float]] = [("receive", self.began)]
        self._is_ended = is_ended

    def begin(self, stage: Stage, at: float | None = None) -> None:
        """Begin a stage, now or `at` a time, and end the current one; an earlier stage does not begin again."""
        present, began = self._begins[-1]
        if not self._is_ended and ORDER[stage] > ORDER[present]:
            self._begins.append((stage, max(time.monotonic() if at is None else at, began)))

    def note(self, name: str, seconds: float, **attributes: int) -> None:
        """Record a detail that ends now and took `seconds`; time before the request's arrival does not count."""
        if not self._is_ended:
            now = time.monotonic()
            self.details.append(Interval(name, max(now - seconds, self.began), now, attributes))

    def describe(self, facts: Mapping[str, Any]) -> None:
        if not self._is_ended:
            self.facts.update(facts)

    def end(self) -> list[Interval]:
        """End the last stage, and return those that took time; later details are ignored."""
        self._is_ended, self.ended = True, time.monotonic()
        ends = [*(began for _, began in self._begins[1:]), self.ended]
        stages = [Interval(name, began, end) for (name, began), end in zip(self._begins, ends, strict=True)]
        return [stage for stage in stages if stage.ended > stage.began]


NO_STAGES = Stages(is_ended=True)

current: ContextVar[Stages] = ContextVar("stages", default=NO_STAGES)


def noting(name: str, observe: Callable[[float], object]) -> Callable[[float], None]:
    """Return a function that records a detail of given seconds that ends now, and passes the seconds to `observe`."""

    def note(seconds: float) -> None:
        observe(seconds)
        current.get().note(name, seconds)

    return note
