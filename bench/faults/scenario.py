"""Faults as data: the function that injects the fault into a running server, its settings, and the checks after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.driver import BenchFailed
from bench.faults.load import Load
from bench.target import Server, Target, get, text_request, wait_until

LOAD_SECONDS = 4.0
RECOVERY_SECONDS = 120.0


class Skipped(Exception):
    """Raised by a fault that cannot be injected on this machine; the message says why."""


@dataclass(slots=True)
class Trial:
    """A running server, its load, and the failed checks so far."""

    server: Server
    target: Target
    load: Load
    folder: Path
    missed: list[str] = field(default_factory=list)
    facts: dict[str, str | float] = field(default_factory=dict)
    may_lose_connections: bool = False

    def expect(self, name: str, is_true: bool) -> None:
        if not is_true:
            self.missed.append(name)

    def run_load(self, seconds: float = LOAD_SECONDS) -> None:
        time.sleep(seconds)

    def recovered(self, seconds: float = RECOVERY_SECONDS) -> float | None:
        """Wait until the server is ready and answers, and return how long it took."""
        try:
            return wait_until(lambda: is_serving(self.target), seconds, "a server that answers")
        except BenchFailed:
            return None

    def expect_recovery(self, seconds: float = RECOVERY_SECONDS) -> None:
        taken = self.recovered(seconds)
        self.expect("recovery", taken is not None)
        if taken is not None:
            self.facts["recovery s"] = round(taken, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault; `make` injects it into a trial under load, and lifts it."""

    name: str
    make: Callable[[Trial], None]
    settings: dict[str, Any] = field(default_factory=dict)
    # prepares the data folder before the server starts, and undoes that after it has ended
    mount: Callable[[Path], None] | None = None
    unmount: Callable[[Path], None] | None = None
    environment: Callable[[Path], dict[str, str]] | None = None


def is_serving(target: Target) -> bool:
    return target.is_ready() and target.send(text_request(2), timeout=20).status == 200


def wait_for_status(target: Target, path: str, status: int, seconds: float) -> float | None:
    """Return the seconds until a path answers with a status, None if it does not."""
    try:
        return wait_until(lambda: target.send(get(path), timeout=5).status == status, seconds, path, pause=0.02)
    except BenchFailed:
        return None
