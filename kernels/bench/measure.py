"""Time as a number and a spread: replays of a captured graph on a GPU, a plain loop on a processor."""

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
    microseconds: float  # median of the replays, a call
    spread: float  # between two rounds, as a share of the smaller
    how: str  # graph, eager, or cpu


@dataclass(frozen=True, slots=True)
class Stopwatch:
    device: torch.device
    replays: int

    def time(self, calls: Sequence[Call], *, graph: bool = True) -> Timing:
        """The calls stand for one another on different memory, so that no cache serves them."""
        for call in calls:
            call()
        if self.device.type != "cuda":
            return self._summed(lambda: [call() for call in calls], len(calls), "cpu")
        if not graph:
            return self._summed(lambda: [call() for call in calls], len(calls), "eager")
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for call in calls:
                call()
        return self._summed(captured.replay, len(calls), "graph")

    def _summed(self, run: Call, num_calls: int, how: str) -> Timing:
        once = self._once_on_gpu if self.device.type == "cuda" else self._once_on_cpu
        first, second = (statistics.median(once(run) for _ in range(self.replays)) for _ in range(2))
        least = min(first, second)
        return Timing(least / num_calls, abs(first - second) / least, how)

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
    stage: str
    what: str
    who: str
    value: float | None
    unit: str = "us"
    floor: float | None = None  # the least that this machine's bandwidth or arithmetic allows, in the same unit
    note: str = ""

    @property
    def of_floor(self) -> float | None:
        return None if self.floor is None or not self.value else self.floor / self.value

    def line(self) -> str:
        value = "-" if self.value is None else f"{self.value:,.2f} {self.unit}"
        share = "" if self.of_floor is None else f"{100 * self.of_floor:.0f}% of the bound"
        return f"{self.what:44} {self.who:28} {value:>18} {share:>20}  {self.note}".rstrip()


@dataclass(slots=True)
class Report:
    """Rows in the order of their measurement, and the clock that ends a stage early rather than the whole."""

    rows: list[Row] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)  # rows for `kernels.configs.load`
    deadline: float = float("inf")

    @contextmanager
    def stage(self, seconds: float) -> Iterator[None]:
        self.deadline = time.monotonic() + seconds
        yield
        self.deadline = float("inf")

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"  {row.line()}", flush=True)

    def timed(self, stage: str, what: str, who: str, floor: float | None, run: Callable[[], Timing]) -> Timing | None:
        """Measure and note; a contender that this machine or torch refuses is noted with its words."""
        if time.monotonic() > self.deadline:
            self.add(Row(stage, what, who, None, note="out of time"))
            return None
        try:
            timing = run()
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as refusal:
            self.add(Row(stage, what, who, None, note=f"refused: {str(refusal).splitlines()[0][:80]}"))
            return None
        note = f"{timing.how}, spread {100 * timing.spread:.0f}%"
        self.add(Row(stage, what, who, timing.microseconds, floor=floor, note=note))
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
        rows = [{**asdict(row), "of_floor": row.of_floor} for row in self.rows]
        file.write_text(
            json.dumps({"about": about, "launches": self.launches, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
