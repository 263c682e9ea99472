"""A fleet under test: `python -m deploy.ray` in its own process, with its own PostgreSQL and folder."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.driver import BenchFailed
from bench.postgresql import postgresql
from bench.serving import HOST, exit_on_sigterm, free_port
from bench.table import ROOT
from bench.target import Target, get
from server.settings import child_environment
from server.telemetry.metrics import PREFIX

MODULE = "deploy.ray"
START_SECONDS, STOP_SECONDS = 300.0, 60.0
READY = re.compile(r"the fleet is ready .*address=(\S+)")
REPLICA = "x-replica"


class Fleet:
    """A running fleet. `flags` are those of its command; an update has others besides."""

    def __init__(self, folder: Path, flags: Mapping[str, object]) -> None:
        self.port = free_port()
        self.target = Target(self.port)
        self._flags = {**flags, "data_dir": folder / "data", "host": HOST, "port": self.port}
        self._log = folder / "fleet.log"
        self._address = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = self._run(self._log, [])
        end = time.monotonic() + START_SECONDS
        while (match := READY.search(self._log.read_text(errors="replace"))) is None:
            if self._process.poll() is not None or time.monotonic() > end:
                raise BenchFailed(f"the fleet did not start:\n{self._log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)
        self._address = match[1]

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def update(self, **flags: object) -> None:
        """Change flags of the running fleet, and wait until it is done."""
        self._flags |= flags
        log = self._log.with_name("update.log")
        process = self._run(log, ["update", "--address", self._address])
        if process.wait(START_SECONDS) != 0:
            raise BenchFailed(f"the fleet was not updated:\n{log.read_text(errors='replace')[-4000:]}")

    def counters(self, *names: str) -> dict[str, dict[str, float]]:
        """Return metrics by name and replica; the values of a replica's models are added up."""
        text = self.target.send(get("/metrics"), timeout=30).body.decode()
        values: dict[str, dict[str, float]] = {name: defaultdict(float) for name in names}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if (name := sample.name.removeprefix(PREFIX)) in values:
                    values[name][sample.labels["replica"]] += sample.value
        return values

    def replicas(self) -> list[str]:
        return sorted(self.counters("engine_ready")["engine_ready"])

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the fleet, those of Ray included; PostgreSQL has its own."""
        assert self._process is not None
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def process_of(self, replica: str) -> psutil.Process:
        """Return the process of a replica, the parent of its engine's."""
        for _ in range(200):
            answer = self.target.send(get("/version"), timeout=30)
            if answer.headers.get(REPLICA) == replica:
                parent = psutil.Process(answer.json()["engine"]["pid"]).parent()
                if parent is not None:
                    return parent
        raise BenchFailed(f"the replica {replica} does not answer")

    def _run(self, log: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
        flags = [text for name, value in self._flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        # a setting of Ray: a program that connects to a cluster by its address must say that it has a token
        environment = child_environment(RAY_AUTH_MODE="token")
        with log.open("w") as file:
            command = [sys.executable, "-m", MODULE, *arguments, *flags]
            return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)


@contextmanager
def running(flags: Mapping[str, object]) -> Iterator[Fleet]:
    """Run a fleet until the block ends."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, postgresql() as database:
        exit_on_sigterm()
        fleet = Fleet(Path(folder), {"database": database, **flags})
        try:
            fleet.start()
            yield fleet
        finally:
            fleet.stop()
