"""Keeps a server at saturation for half an hour: `python -m bench.soak [--minutes 30] [--model tiny]`.

Clients of three tenants send requests of all kinds as fast as they are answered: with support sets and retrieval,
cancelled at random points, and with bad input. Meanwhile PostgreSQL is killed and started again. Each request that was not
cancelled must have had one clear answer, acknowledged data must be stored and visible only to their tenant, and no process
may have grown.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from scipy.stats import linregress

from bench import mixture
from bench.cancellations import PRIMITIVE_CACHES, cancel, with_small_caches
from bench.driver import BenchFailed
from bench.faults.load import draw, stored_path
from bench.filling import fill
from bench.options import add_model, as_settings, parse
from bench.postgresql import PostgreSQL, postgresql_server
from bench.serving import exit_on_sigterm
from bench.table import Bar, Report
from bench.target import Answer, Request, Server, Target, command_of, get, image_part, post, text_request
from model.config import load_config
from server.access.keys import Keys
from server.limits.deadline import HEADER
from server.settings import child_environment
from server.store.database import Database

QUICK = {"model": "tiny", "minutes": 0.3, "fill_seconds": 5.0}
TENANTS = ("acme", "birds", "cats")
CLIENTS_PER_TENANT = 4
SAMPLE_SECONDS = 5.0
# The server ends a request after this time: at saturation, some requests wait for long for those of a higher priority.
DEADLINE_SECONDS = 120.0
# long, because a machine that also does other work is slow, which is not a fault of the server
REQUEST_SECONDS = 600.0
# fractions of the whole time: after which processes are measured, and in which PostgreSQL is not running
WARM_UP, DOWN_FROM, DOWN_TO = 1 / 3, 0.5, 0.52
CANCELLED, BAD = 0.15, 0.1
MIN_ANSWERED = 0.5
POINTS = ("body", "work", "answer")
MAX_SLOPE = 1.0
# before that, other parts still grow
MIN_MINUTES = 5.0


class Tenant(Target):
    """The server from the view of a tenant's client: each request has the tenant's key and a deadline."""

    def __init__(self, target: Target, key: str) -> None:
        super().__init__(target.port, process=target.process)
        self._headers = {"Authorization": f"Bearer {key}", HEADER: f"{DEADLINE_SECONDS:g}"}

    def send(self, request: Request, *, timeout: float = REQUEST_SECONDS, source: str | None = None) -> Answer:
        return super().send(self.signed(request), timeout=timeout, source=source)

    def signed(self, request: Request) -> Request:
        return replace(request, headers={**request.headers, **self._headers})


def bad_request(rng: random.Random) -> Request:
    """Return a request that must be refused."""
    requests = (
        Request(body=b'{"prompt": "a", ', headers={"Content-Type": "application/json"}),
        text_request(prompt="a", unheard_of=1),
        text_request(prompt=[image_part(rng.randbytes(300))]),
        text_request(temperature=-1.0),
        text_request(10**9),
        post("/v1/fewshot/completions", examples={"support_set": "missing"}, query={"question": "?"}),
        post("/v1/classify", shots=[], query={}, candidates=["a"]),
        post("/v1/completions", prompt=[{"type": "image_id", "image_id": "../../etc/passwd"}]),
        Request(path="/v1/images", body=rng.randbytes(500), headers={"Content-Type": "image/jpeg"}),
        get("/v1/support_sets/..%2F..%2Fx"),
    )
    return rng.choice(requests)


@dataclass(slots=True)
class Traffic:
    """The traffic of one tenant: numbers of answers by kind, and the paths of resources acknowledged as stored."""

    target: Tenant
    answers: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)

    def run(self, rng: random.Random, stop: threading.Event) -> None:
        """Send one request after the other until `stop` is set."""
        while not stop.is_set():
            number = rng.random()
            if number < CANCELLED:
                request = self.target.signed(mixture.draw(rng)[1])
                cancel(self.target, request, rng.choice(POINTS), rng)
                self.answers["cancelled"] += 1
            elif number < CANCELLED + BAD:
                self._note("bad input", self.target.send(bad_request(rng)), is_bad=True)
            else:
                kind, request = draw(rng)
                self._note(kind, self.target.send(request))

    def _note(self, kind: str, answer: Answer, *, is_bad: bool = False) -> None:
        is_expected = answer.is_clear and not (is_bad and answer.status < 400)
        if not is_expected:
            self.faults.append(f"{kind}: {answer.status} {answer.error} {answer.seconds:.0f} s {answer.body[:200]!r}")
        if (path := stored_path(kind, answer)) is not None:
            self.stored.append(path)
        self.answers["answered" if answer.status < 300 else "unavailable" if answer.status >= 500 else "refused"] += 1


class Memory:
    """Samples the resident memory of all processes of a server, in MiB, by the names and numbers of the processes."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.samples: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def sample(self, minutes: float) -> None:
        worker = self._target.worker_id()
        for process in self._target.processes():
            try:
                size = process.memory_info().rss / 2**20
                name = _name(process, worker)
            except psutil.Error:  # it has just ended
                continue
            self.samples[name].append((minutes, size))

    def add_to(self, report: Report, num_samples: int) -> None:
        """Add a row and a bar for each process that lived through at least half of the samples."""
        for name, samples in sorted(self.samples.items()):
            if len(samples) < max(num_samples / 2, 2):
                continue
            times, sizes = zip(*samples, strict=True)
            slope = float(linregress(times, sizes).slope)
            report.add(
                {
                    "process": name,
                    "samples": len(samples),
                    "first MiB": sizes[0],
                    "last MiB": sizes[-1],
                    "MiB per minute": round(slope, 3),
                }
            )
            if times[-1] - times[0] >= MIN_MINUTES:
                report.bars.append(Bar(name=f"growth of {name}, MiB per minute", value=slope, at_most=MAX_SLOPE))


def _name(process: psutil.Process, worker: int | None) -> str:
    command = " ".join(command_of(process))
    if process.pid == worker:
        return f"worker {process.pid}"
    for name, module in (("decoder", "media.decoder"), ("spare", "engine.worker")):
        if module in command:
            return f"{name} {process.pid}"
    return f"API {process.pid}" if "server" in command else f"other {process.pid}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    report = Report("A server at saturation", as_settings(options), packages=["scipy", "psycopg"])
    with postgresql_server() as database, tempfile.TemporaryDirectory() as folder:
        keys = asyncio.run(make_keys(database.url))
        environment = child_environment(FLAMBOYANCE_DATABASE=database.url, **PRIMITIVE_CACHES)
        settings = with_small_caches(options)
        server = Server(settings, Path(folder), environment)
        exit_on_sigterm()
        try:
            target = server.start()
            tenants = [Traffic(Tenant(target, key)) for key in keys]
            # full caches grow no more, however few requests a slow machine answers
            fill(tenants[0].target, load_config(Path(str(settings.model))), settings, options.fill_seconds)
            soak(tenants, database, 60 * options.minutes, options.seed, report)
        finally:
            server.stop()
    report.print()
    return int(not all(bar.is_met for bar in report.bars))


async def make_keys(database_url: str) -> list[str]:
    """Create a key for each tenant, and return the secrets."""
    database = Database(database_url)
    try:
        keys = Keys(database)
        return [(await keys.create(tenant, "manage", tenant=tenant))[1] for tenant in TENANTS]
    finally:
        database.close()


def soak(tenants: Sequence[Traffic], database: PostgreSQL, seconds: float, seed: int, report: Report) -> None:
    """Send requests for `seconds`, and add lost data and the growth of processes to a report."""
    for tenant in tenants:
        mixture.prepare(tenant.target)
    target = tenants[0].target
    worker = target.worker_id()
    stop = threading.Event()
    clients = [
        threading.Thread(target=tenant.run, args=(random.Random(f"{seed} {number} {client}"), stop), daemon=True)
        for number, tenant in enumerate(tenants)
        for client in range(CLIENTS_PER_TENANT)
    ]
    for thread in clients:
        thread.start()
    memory = Memory(target)
    num_samples = watch(memory, database, seconds)
    stop.set()
    for thread in clients:
        thread.join(REQUEST_SECONDS + 5)
    memory.add_to(report, num_samples)
    report.bars.append(
        Bar(name="clients that never ended", value=sum(map(threading.Thread.is_alive, clients)), at_most=0)
    )
    add_traffic(tenants, report)
    report.bars.append(Bar(name="deaths of the worker", value=float(target.worker_id() != worker), at_most=0))


def watch(memory: Memory, database: PostgreSQL, seconds: float) -> int:
    """Sample memory after the warm-up, stop PostgreSQL for a while, and return the number of samples."""
    began, is_down, was_down, count = time.monotonic(), False, False, 0
    while (passed := time.monotonic() - began) < seconds:
        if not was_down and passed >= DOWN_FROM * seconds:
            database.kill()
            is_down = was_down = True
        if is_down and passed >= DOWN_TO * seconds:
            database.start()
            is_down = False
        if passed >= WARM_UP * seconds and not is_down:
            memory.sample(passed / 60)
            count += 1
        time.sleep(min(SAMPLE_SECONDS, seconds / 100))
    if is_down:
        database.start()
    return count


def add_traffic(tenants: Sequence[Traffic], report: Report) -> None:
    """Add the numbers of answers, and bars for unclear answers, and for data that were lost or seen by another tenant."""
    answers = sum((tenant.answers for tenant in tenants), Counter[str]())
    report.settings |= {**{f"requests {kind}": number for kind, number in sorted(answers.items())}}
    faults = [fault for tenant in tenants for fault in tenant.faults]
    report.settings |= {f"fault {number}": fault for number, fault in enumerate(faults[:10], 1)}
    lost = [path for tenant in tenants for path in tenant.stored if tenant.target.send(get(path)).status != 200]
    report.settings["stored"] = sum(len(tenant.stored) for tenant in tenants)
    seen = [
        path
        for tenant, other in zip(tenants, [*tenants[1:], tenants[0]], strict=True)
        for path in tenant.stored
        if path.startswith("/v1/support_sets") and other.target.send(get(path)).status != 404
    ]
    for name, entries in (("requests without one clear answer", faults), ("lost", lost), ("seen by others", seen)):
        report.bars.append(Bar(name=name, value=len(entries), at_most=0))
    # a server that refuses everything loses nothing and shows nothing
    ended = answers.total() - answers["cancelled"]
    report.bars.append(Bar(name="share answered", value=answers["answered"] / max(ended, 1), at_least=MIN_ANSWERED))
    fewest = min(sum(path.startswith("/v1/support_sets") for path in tenant.stored) for tenant in tenants)
    report.bars.append(Bar(name="sets stored by each tenant", value=fewest, at_least=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    add_model(parser, "default")
    parser.add_argument("--minutes", type=float, default=30.0, help="minutes under load (default: 30)")
    parser.add_argument(
        "--fill-seconds", type=float, default=600.0, help="maximum seconds to fill the caches before it (default: 600)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default: 0)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchFailed as failure:
        sys.exit(str(failure))
