"""Checks that cancelled requests leak no resources: `python -m bench.cancellations [--requests 5000]`.

Requests of all routes are cancelled at random points: within the body, while the server works, and within the answer.
Afterwards the numbers of blocks, slots, pins, file descriptors and threads, and the memory, must be as before. The same
number of requests is cancelled before the first measurement, so that caches and pools have grown by then.
"""

from __future__ import annotations

import argparse
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import ceil

import psutil
import torch

from bench import mixture
from bench.driver import BenchFailed
from bench.options import add_model, model_folder, parse, server_settings
from bench.table import Bar, Report
from bench.target import Request, Target, encoded, image_request, running, wait_until
from server.engine.build import block_bytes
from server.engine.device.memory import MIB
from server.served_model import ServedModel
from server.settings import Settings, child_environment
from server.store.database import NUM_THREADS

QUICK = {"model": "tiny", "requests": 200}
NUM_CLIENTS = 12
IDLE_SECONDS = 120.0
ANSWER_SECONDS = 60.0
POINTS = ("body", "work", "answer", "none")
# closes a connection with a reset instead of an end
RESET = struct.pack("ii", 1, 0)
# only one is written at a time, so all threads of the database that a client may have get a transaction, and a connection
NUM_WRITERS = 4 * NUM_THREADS
# pictures that no other request shows: several at once start every decode process that was ended by a cancellation
NUM_NEW_PICTURES = 16
FIRST_NEW_PICTURE = 10**6
# the gauges of an idle engine, which cancelled requests must not change
GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "media_slots_in_use",
    "media_slots_pinned",
)
# the warm-up fills every cache, so that a larger process later is a leak
MAX_MODEL_LEN = 1024
NUM_CACHED_TOKENS = 2 * MAX_MODEL_LEN
MEDIA_CACHES = {"media_cache_mb": 32, "host_media_mb": 16}
# Each shape of a product is described and compiled once. torch caches the descriptions and oneDNN the code, 1,024 of each
# by default, and each takes a quarter of a MiB: thousands of requests would not fill these caches.
PRIMITIVE_CACHES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# resident memory may grow by this much, because an allocator keeps pages
MAX_GROWTH_MB = 128.0
# threads of pools and pooled connections that even a long warm-up may not have started
SLACK = 8


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The resources that an idle server holds."""

    gauges: dict[str, float]
    descriptors: dict[str, int]
    threads: dict[str, int]
    memory_mb: dict[str, float]
    num_decoders: int
    num_zombies: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    settings = with_small_caches(options)
    report = Report("Cancelled requests", {"model": options.model, "requests": options.requests, "seed": options.seed})
    with running(settings, child_environment(**PRIMITIVE_CACHES)) as target:
        run(target, options.requests, options.seed, report)
    report.print()
    return int(not all(bar.is_met for bar in report.bars))


def with_small_caches(options: argparse.Namespace) -> Settings:
    """Return the settings of a server whose caches hold little, whatever the size of the model."""
    folder = model_folder(options.model)
    config = ServedModel.load(Settings(model=str(folder))).config
    kv_cache_mb = ceil(block_bytes(config, NUM_CACHED_TOKENS, torch.float32) / MIB)
    return server_settings(options, folder, max_model_len=MAX_MODEL_LEN, kv_cache_mb=kv_cache_mb, **MEDIA_CACHES)


def run(target: Target, num_requests: int, seed: int, report: Report) -> None:
    """Cancel requests, and add what the server holds before, halfway and after to a report."""
    worker = target.worker_id()
    cancel_all(target, num_requests, seed)
    fill_pools(target)
    before = idle_snapshot(target)
    first = num_requests // 2
    points = cancel_all(target, first, seed + 1)
    halfway = idle_snapshot(target)
    points += cancel_all(target, num_requests - first, seed + 2)
    after = idle_snapshot(target)
    report.settings |= {f"cancelled in the {point}": count for point, count in points.items()}
    compare(report, before, halfway, after, float(target.worker_id() != worker))


def fill_pools(target: Target) -> None:
    """Fill the server's pools: let it start every thread, connection and decode process for which they have room."""
    pictures = range(FIRST_NEW_PICTURE, FIRST_NEW_PICTURE + NUM_NEW_PICTURES)
    requests = [mixture.put_examples(random.Random(number)) for number in range(NUM_WRITERS)]
    requests += map(image_request, pictures)
    with ThreadPoolExecutor(len(requests)) as clients:
        for answer in clients.map(target.send, requests):
            if answer.status != 200:
                raise BenchFailed(f"a request was not served: {answer.status} {answer.body[:500]!r}{answer.error}")


def cancel_all(target: Target, num_requests: int, seed: int) -> Counter[str]:
    """Cancel requests on several connections at a time, and return the number of requests per point."""
    mixture.prepare(target)
    points, lock = Counter[str](), threading.Lock()

    def cancel_one(number: int) -> None:
        rng = random.Random(seed << 32 | number)
        point = rng.choice(POINTS)
        cancel(target, mixture.draw(rng)[1], point, rng)
        with lock:
            points[point] += 1

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        for done in clients.map(cancel_one, range(num_requests)):
            assert done is None
    return points


def cancel(target: Target, request: Request, point: str, rng: random.Random) -> None:
    """Send a request and close its connection at a point."""
    message = encoded(request, target.host)
    with socket.create_connection((target.host, target.port), timeout=ANSWER_SECONDS) as connection:
        if rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        try:
            if point == "body":
                connection.sendall(message[: rng.randrange(len(message))])
                time.sleep(rng.random() * 0.05)
                return
            connection.sendall(message)
            if point == "work":
                time.sleep(10 ** rng.uniform(-3.5, 0))
            elif point == "answer":
                connection.recv(rng.choice((1, 100, 4096)))
            else:
                while connection.recv(2**16):
                    pass
        except OSError:
            return  # the server was faster


def idle_snapshot(target: Target) -> Snapshot:
    """Wait until the server is idle, without what the requests have stored, and return what it holds."""
    mixture.clean(target)
    with suppress(BenchFailed):  # the report shows what is still held
        wait_until(lambda: _is_idle(target), IDLE_SECONDS, "an idle server")
    time.sleep(2)  # the next heartbeats
    named = {"API": target.process, "worker": target.worker()}
    return Snapshot(
        gauges={name: value for name, value in target.gauges().items() if name in GAUGES},
        descriptors={name: process.num_fds() for name, process in named.items()},
        threads={name: process.num_threads() for name, process in named.items()},
        memory_mb={name: process.memory_info().rss / 2**20 for name, process in named.items()},
        num_decoders=len(target.decoders()),
        num_zombies=sum(process.status() == psutil.STATUS_ZOMBIE for process in target.processes()),
    )


def _is_idle(target: Target) -> bool:
    gauges = target.gauges()
    return all(gauges[name] == 0 for name in GAUGES)


def compare(report: Report, before: Snapshot, halfway: Snapshot, after: Snapshot, deaths: float) -> None:
    """Add a row and a bar per resource. A leak grows as much in the second half as in the first."""
    first, middle, last = _held(before), _held(halfway), _held(after)
    limits = {
        **first,
        **{name: value + SLACK for name, value in first.items() if name.startswith(("file descriptors", "threads"))},
        **{name: value + MAX_GROWTH_MB for name, value in first.items() if name.startswith("memory")},
        "decode processes": max(before.num_decoders, 2),
        "zombies": 0,
    }
    for name, limit in limits.items():
        _add(report, name, first[name], middle[name], last[name], limit)
    _add(report, "deaths of the worker", 0, 0, deaths, 0)


def _held(snapshot: Snapshot) -> dict[str, float]:
    return {
        **snapshot.gauges,
        **{f"file descriptors, {name}": number for name, number in snapshot.descriptors.items()},
        **{f"threads, {name}": number for name, number in snapshot.threads.items()},
        **{f"memory in MiB, {name}": size for name, size in snapshot.memory_mb.items()},
        "decode processes": snapshot.num_decoders,
        "zombies": snapshot.num_zombies,
    }


def _add(report: Report, name: str, before: float, halfway: float, after: float, at_most: float) -> None:
    report.add({"held": name, "before": before, "halfway": halfway, "after": after, "at most": at_most})
    report.bars.append(Bar(name=name, value=after, at_most=at_most))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cancellations", description=__doc__)
    add_model(parser, "default")
    parser.add_argument("--requests", type=int, default=5000, help="requests to cancel (default: 5000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of requests and points (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
