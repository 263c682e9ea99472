"""Runs a function over numbered inputs in a child process, so that a crash or an endless loop is a result.

The child reports how often each failure happened and the number of its first input. After a crash it continues with the
next input.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized

import psutil

from bench.table import Bar, Report

# an input is read by a seeded generator; the function returns the name of a failure
Try = Callable[[random.Random], str | None]
HANG_SECONDS = 30.0
POLL_SECONDS = 0.2
BATCH = 200
MAX_GROWTH_MB = 64.0


@dataclass(slots=True)
class Tally:
    """Failures by name, with their count and the first input numbers; and the memory of a process, early and late."""

    num_inputs: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, list[int]] = field(default_factory=dict)
    num_ends: int = 0
    early_mb: float = 0.0
    late_mb: float = 0.0

    def add(self, name: str, number: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        self.numbers.setdefault(name, []).append(number)
        del self.numbers[name][3:]

    def merge(self, other: Tally) -> None:
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
            self.numbers[name] = (self.numbers.get(name, []) + other.numbers[name])[:3]
        self.early_mb = self.early_mb or other.early_mb
        self.late_mb = other.late_mb or self.late_mb

    def report(self, report: Report) -> Report:
        """Add rows and bars."""
        for name, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            report.add({"failure": name, "times": count, "first inputs": ", ".join(map(str, self.numbers[name]))})
        report.add({"failure": "all inputs", "times": self.num_inputs})
        report.bars += [
            Bar(name="ends of a process", value=self.num_ends, at_most=0),
            Bar(name="failures", value=sum(self.counts.values()), at_most=0),
            Bar(name="growth of memory in MiB", value=self.late_mb - self.early_mb, at_most=MAX_GROWTH_MB),
        ]
        return report


def rng_of(seed: int, number: int) -> random.Random:
    return random.Random(seed << 40 | number)


def run(make: Callable[[], Try], num_inputs: int, seed: int) -> Tally:
    """Try inputs 0 to `num_inputs` in child processes. `make`, called in each child, must be a function of a module."""
    context = multiprocessing.get_context("spawn")
    tally, number = Tally(), 0
    while number < num_inputs:
        current = context.Value("q", number)
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_run, args=(make, number, num_inputs, seed, current, sender), daemon=True)
        child.start()
        sender.close()
        is_hung = _collect(child, current, receiver, tally)
        child.join()
        if child.exitcode == 0:
            break
        number = current.value
        tally.num_ends += 1
        tally.add("an endless loop" if is_hung else f"the process ended with {child.exitcode}", number)
        number += 1
    tally.num_inputs = num_inputs
    return tally


def _collect(
    child: multiprocessing.context.SpawnProcess, current: Synchronized[int], receiver: Connection, tally: Tally
) -> bool:
    """Merge the reports of a child until it ends; kill it, and return True, if it stays at one input."""
    last, since = -1, time.monotonic()
    while True:
        try:
            while receiver.poll(POLL_SECONDS):
                tally.merge(receiver.recv())
        except EOFError:
            return False
        if current.value != last:
            last, since = current.value, time.monotonic()
        elif time.monotonic() - since > 2 * HANG_SECONDS:
            child.kill()
            return True


def _run(
    make: Callable[[], Try], first: int, end: int, seed: int, current: Synchronized[int], sender: Connection
) -> None:
    attempt, process, tally = make(), psutil.Process(), Tally()
    for number in range(first, end):
        current.value = number
        began = time.monotonic()
        failure = attempt(rng_of(seed, number))
        if failure is None and time.monotonic() - began > HANG_SECONDS:
            failure = f"an input took longer than {HANG_SECONDS:g} seconds"
        if failure is not None:  # reported at once: the next input may end this process
            tally.add(failure, number)
            sender.send(tally)
            tally = Tally()
        if number % BATCH == 0 or number == end - 1:
            memory = process.memory_info().rss / 2**20
            # caches and arenas have filled after the first tenth
            sender.send(Tally(early_mb=memory if number >= end // 10 else 0.0, late_mb=memory))
    sender.close()
