"""Time measurement and its report. A GPU replays a captured graph; a CPU runs a plain loop."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of a call and the spread of its measurement."""

    microseconds: float  # per call, median of the replays
    spread: float  # difference between two rounds, relative to the smaller
    method: str  # graph, eager, or cpu


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Measures the time of calls on a device."""

    device: torch.device
    replays: int

    def time(self, calls: Sequence[Call], *, graph: bool = True) -> Timing:
        """Return the time per call. The calls do the same work on different memory, so that no cache serves them."""
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


@dataclass(frozen=True, slots=True)
class Row:
    """One measured value of an implementation in a case."""

    stage: str
    case: str
    name: str  # of the implementation
    value: float | None
    unit: str = "us"
    bound: float | None = None  # the minimum that the bandwidth and FLOPs of the machine allow, in the same unit
    note: str = ""

    @property
    def of_bound(self) -> float | None:
        return None if self.bound is None or not self.value else self.bound / self.value

    def line(self) -> str:
        value = "-" if self.value is None else f"{self.value:,.2f} {self.unit}"
        share = "" if self.of_bound is None else f"{100 * self.of_bound:.0f}% of the bound"
        return f"{self.case:44} {self.name:28} {value:>18} {share:>20}  {self.note}".rstrip()


@dataclass(slots=True)
class Report:
    """Collects rows in the order of their measurement, and skips the rest of a stage after its time limit."""

    rows: list[Row] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)  # rows for `kernels.backend.load_launches`
    deadline: float = float("inf")

    @contextmanager
    def stage(self, seconds: float) -> Iterator[None]:
        self.deadline = time.monotonic() + seconds
        yield
        self.deadline = float("inf")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"  {row.line()}", flush=True)

    def add_rejected(self, stage: str, case: str, name: str, error: Exception) -> None:
        """Add a row for an implementation that this machine or torch rejects."""
        self.add(Row(stage, case, name, None, note=f"rejected: {str(error).splitlines()[0][:80]}"))

    def timed(self, stage: str, case: str, name: str, bound: float | None, run: Callable[[], Timing]) -> Timing | None:
        """Measure an implementation and add its row. Return None if it is rejected or the stage is out of time."""
        if time.monotonic() > self.deadline:
            self.add(Row(stage, case, name, None, note="out of time"))
            return None
        try:
            timing = run()
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            self.add_rejected(stage, case, name, error)
            return None
        note = f"{timing.method}, spread {100 * timing.spread:.0f}%"
        self.add(Row(stage, case, name, timing.microseconds, bound=bound, note=note))
        return timing

    def table(self) -> str:
        lines, stage = [], ""
        for row in self.rows:
            if row.stage != stage:
                stage = row.stage
                lines.append(f"\n{stage}")
            lines.append(f"  {row.line()}")
        return "\n".join(lines)

    def write(self, file: Path, about: dict[str, Any]) -> None:
        rows = [{**asdict(row), "of_bound": row.of_bound} for row in self.rows]
        file.write_text(
            json.dumps({"about": about, "launches": self.launches, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
