"""A normal client in a separate process, which measures the times of its requests and of liveness probes.

It sends from its own address and also from the attacker's, where a server that counts per address sees one client.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from bench.table import Sample
from bench.target import REQUEST_SECONDS, Answer, Request, Target, get, image_request, text_request

PROBE_SECONDS = 30.0
PROBE_PAUSE = 0.1
KINDS: dict[str, Callable[[], Request]] = {
    "text": lambda: text_request(prompt=f"{random.randrange(10**6)} flamingos are"),
    "image": lambda: image_request(random.randrange(10**9)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The size of a measurement: `count` requests of each kind from each address, or fewer in `max_seconds`."""

    host: str
    port: int
    api_process: int | None
    addresses: tuple[str | None, ...]
    count: int
    max_seconds: float


@dataclass(frozen=True, slots=True)
class Series:
    """The seconds of requests; a failed request counts as the longest."""

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        is_served = answer.status == 200
        self.seconds.append(answer.seconds if is_served else REQUEST_SECONDS)
        if not is_served:
            self.failures.append(str(answer.status or answer.error))

    def percentile(self, percent: float) -> float:
        return Sample(tuple(self.seconds or [REQUEST_SECONDS])).percentile(percent)


@dataclass(frozen=True, slots=True)
class Measured:
    """The series by kind and by the number of the address, the slowest probe, and the largest API process in MiB."""

    series: dict[tuple[str, int], Series]
    slowest_probe: float
    peak_mb: float


def measure(plan: Plan) -> Measured:
    """Send requests one after the other, in alternation of kinds and addresses, with probes in between."""
    target = Target(plan.port, plan.host)
    probe = _Probe(target, plan)
    probe.start()
    series = {(kind, i): Series() for kind in KINDS for i in range(len(plan.addresses))}
    began = time.monotonic()
    for _ in range(plan.count):
        for (kind, i), times in series.items():
            left = plan.max_seconds - (time.monotonic() - began)
            if left > 0 or not times.seconds:
                timeout = min(REQUEST_SECONDS, max(left, 5.0))
                times.add(target.send(KINDS[kind](), timeout=timeout, source=plan.addresses[i]))
    probe.end()
    return Measured(series, probe.slowest, probe.peak_mb)


class _Probe(threading.Thread):
    """Probes liveness and memory until it is ended."""

    def __init__(self, target: Target, plan: Plan) -> None:
        super().__init__(daemon=True)
        self.slowest = 0.0
        self.peak_mb = 0.0
        self._target = target
        self._source = plan.addresses[0]
        self._process = None if plan.api_process is None else psutil.Process(plan.api_process)
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(PROBE_PAUSE):
            answer = self._target.send(get("/health/live"), timeout=PROBE_SECONDS, source=self._source)
            self.slowest = max(self.slowest, answer.seconds if answer.status == 200 else PROBE_SECONDS)
            if self._process is not None:
                self.peak_mb = max(self.peak_mb, self._process.memory_info().rss / 2**20)

    def end(self) -> None:
        self._over.set()
        self.join()
