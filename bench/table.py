"""The report of a benchmark: the machine, the versions, a table of medians, and the same as JSON in the last line.

Two programs are compared in alternation, so that other load on the machine affects both. A ratio is the median of the
ratios of the pairs; a spread is the minimum and the maximum.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
GAP = "  "

Cell = str | int | float | None
Row = Mapping[str, Cell]
Run = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Sample:
    """The values of one quantity that was measured several times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def over(self, other: Sample) -> Sample:
        """Return the ratios to another sample, round by round."""
        return Sample(tuple(value / base for value, base in zip(self.values, other.values, strict=True)))

    def percentile(self, percent: float) -> float:
        """Return the smallest value that at least `percent` of the values do not exceed."""
        rank = max(-(-len(self.values) * percent // 100), 1)
        return sorted(self.values)[int(rank) - 1]

    def spread(self, digits: int = 3) -> str:
        return f"{min(self.values):.{digits}g} .. {max(self.values):.{digits}g}"


def interleave(rounds: Iterable[Mapping[str, Run]]) -> dict[str, Sample]:
    """Run rounds of the same runs one after the other, and collect the values that each run returns."""
    measured = [{name: run() for name, run in runs.items()} for runs in rounds]
    return {name: Sample(tuple(values[name] for values in measured)) for name in measured[0]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A target of a benchmark: the measured value must be at least, or at most, a limit."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_met(self) -> bool:
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    def __str__(self) -> str:
        limit = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"{'met   ' if self.is_met else 'MISSED'}{GAP}{self.name}: {self.value:.3g}, target {limit}"


class Report:
    """Collects rows and bars, and prints them. The reported time runs from the construction of the report."""

    def __init__(self, title: str, settings: Mapping[str, Any], packages: Sequence[str] = ()) -> None:
        self.title = title
        self.settings = dict(settings)
        self.machine = machine(packages)
        self.rows: list[Row] = []
        self.bars: list[Bar] = []
        self._began = time.monotonic()

    def add(self, row: Row) -> None:
        """Add a row, and write it to standard error at once, so that it is not lost if the run fails later."""
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    def print(self, heading: str | None = None) -> None:
        """Print the report. `heading` is a column whose values head a table each; otherwise there is one table."""
        print(f"{self.title}\n")
        facts = {**self.machine, **self.settings}
        print(format_table([{"": name, " ": _format_cell(value)} for name, value in facts.items()]))
        print(f"\n{format_table(self.rows) if heading is None else _format_tables(self.rows, heading)}\n")
        for bar in self.bars:
            print(bar)
        print(json.dumps(self.as_json()))

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "machine": self.machine,
            "settings": self.settings,
            "rows": self.rows,
            "bars": [{**asdict(bar), "is_met": bar.is_met} for bar in self.bars],
            "seconds": round(time.monotonic() - self._began, 1),
        }


def _format_tables(rows: Sequence[Row], heading: str) -> str:
    """Format the rows as a table for each value in the column `heading`."""
    tables: dict[Cell, list[Row]] = {}
    for row in rows:
        rest = {name: cell for name, cell in row.items() if name != heading}
        tables.setdefault(row[heading], []).append(rest)
    return "\n\n".join(f"{value}\n{format_table(table)}" for value, table in tables.items())


def format_table(rows: Sequence[Row]) -> str:
    """Format rows as text, with text aligned left and numbers right. A row may lack cells."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns] + [[_format_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_number = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in columns]
    lines = [
        GAP.join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, is_number, strict=True))
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines if line.strip(" ") or not columns)


def _format_cell(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return str(cell)


def machine(packages: Sequence[str]) -> dict[str, Cell]:
    """Return the conditions of a measurement: the hardware, the versions, the commit and the load before the start."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "system": platform.platform(),
        "load before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", *packages)},
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    process = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return process.stdout.strip() or "not a git checkout"
