"""Measures the time of calls: a GPU replays a captured graph, a CPU runs a plain loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
WRONG = "WRONG"  # begins the note of a result that differs from its reference


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of a call and the spread of its measurement."""

    microseconds: float  # per call, median of the replays
    spread: float  # difference between two rounds, relative to the smaller
    method: str  # graph, eager, or cpu

    @property
    def note(self) -> str:
        return f"{self.method}, spread {100 * self.spread:.0f}%"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measured value, and the work that it is compared with."""

    value: float
    unit: str = "us"
    num_bytes: float = 0.0  # bytes that any implementation must move
    flops: float = 0.0
    note: str = ""

    @classmethod
    def of(cls, timing: Timing, num_bytes: float = 0.0, flops: float = 0.0) -> Result:
        return cls(value=timing.microseconds, num_bytes=num_bytes, flops=flops, note=timing.note)


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Measures the time of calls on a device."""

    device: torch.device
    replays: int

    def time(self, calls: Sequence[Call], *, graph: bool = True) -> Timing:
        """Return the time per call. The calls must do the same work on different memory, so that caches do not help."""
        for call in calls:
            call()
        if self.device.type != "cuda":
            return self._measure(lambda: [call() for call in calls], len(calls), "cpu")
        if not graph:
            return self._measure(lambda: [call() for call in calls], len(calls), "eager")
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for call in calls:
                call()
        return self._measure(captured.replay, len(calls), "graph")

    def _measure(self, run: Call, num_calls: int, method: str) -> Timing:
        once = self._once_on_gpu if self.device.type == "cuda" else self._once_on_cpu
        first, second = (statistics.median(once(run) for _ in range(self.replays)) for _ in range(2))
        fastest = min(first, second)
        return Timing(fastest / num_calls, abs(first - second) / fastest, method)

    def _once_on_gpu(self, run: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def _once_on_cpu(self, run: Call) -> float:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6
