"""Measures the tables of costs.json: of a replica on one core, alone and while the other core measures as well."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.driver import BenchFailed
from bench.fleet.costs import Costs, load_all, mean, parse, save
from bench.table import ROOT

ALONE, SHARED = "one core", "one core, both busy"


@dataclass(frozen=True, slots=True)
class Conditions:
    """The threads of a model, and how many programs measure at the same time."""

    threads: int
    copies: int


TABLES: Mapping[str, Conditions] = {ALONE: Conditions(1, 1), SHARED: Conditions(1, 2)}


def measure_tables(file: Path, *, is_quick: bool) -> None:
    for name, conditions in TABLES.items():
        costs = measure(conditions, is_quick=is_quick)
        save(file, name, costs)
        print(f"{name}: {costs}")


def measure_ray(file: Path, *, is_quick: bool) -> None:
    """Add what a request through Ray costs to each table of a file. Raises `BenchFailed`."""
    command = [sys.executable, "-m", "bench.fleet.measure_ray", "--costs-file", str(file), "--costs", ALONE]
    (output,) = _run([*command, *(["--quick"] if is_quick else [])], copies=1)
    through_ray = json.loads(output)
    for name, costs in load_all(file).items():
        save(file, name, replace(costs, **through_ray))
    print(through_ray)


def measure(conditions: Conditions, *, is_quick: bool) -> Costs:
    """Measure in several processes at once, and return the mean of their tables. Raises `BenchFailed`."""
    command = [sys.executable, "-m", "bench.fleet.measure", "--threads", str(conditions.threads)]
    command += ["--quick"] if is_quick else []
    costs = mean([parse(json.loads(output)) for output in _run(command, conditions.copies)])
    return replace(costs, conditions={**costs.conditions, "programs at once": conditions.copies})


def _run(command: Sequence[str], copies: int) -> list[str]:
    """Run copies of a command at the same time, and return the last line of each one's output."""
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(copies)]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise BenchFailed(f"{' '.join(command)} failed")
    return [output.splitlines()[-1] for output in outputs]
