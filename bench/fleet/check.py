"""Compares one simulated replica with a real server that gets the same requests: `python -m bench.fleet --check`."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bench.driver import BenchFailed
from bench.fewshot import Client
from bench.fleet.caches import CacheSizes, Shape
from bench.fleet.costs import load
from bench.fleet.fleet import Outcome, Scenario, simulate
from bench.fleet.measuring import ALONE, TABLES
from bench.fleet.policies import RoundRobin
from bench.fleet.ray_run import shape_of
from bench.fleet.setup import Measure, sample
from bench.fleet.support_sets import Answer, SupportSets
from bench.options import model_folder
from bench.ray_workload import QUICK, STEP_TIME_TARGET, Workload
from bench.table import Report, Row
from bench.target import Target, get, running
from server.settings import Settings

WORKLOAD = Workload(num_sets=30, num_warmup=60, num_requests=140, num_clients=2, cached_sets=8)
# of the default model: bytes of a media page and of a token's keys and values
PAGE_BYTES, TOKEN_BYTES = 786_432, 23_040
MIB = 2**20
NUM_SEEDS = 5


def check(options: argparse.Namespace) -> int:
    """Print the hit rates and times of both, and their ratios."""
    workload = QUICK if options.quick else WORKLOAD
    name = options.costs or ALONE
    costs = load(options.costs_file, name)
    report = Report("One replica, simulated and real", {"workload": str(workload), "costs": name})
    settings = _settings(workload, TABLES[name].threads if name in TABLES else 1, is_quick=options.quick)
    with running(settings) as target:
        sizes, answers = _sizes(target), Load(target, workload).run()
    scenario = replace(_scenario(workload), sizes=sizes)
    draws = list(workload.draws(0))
    outcomes = [simulate(scenario, costs, RoundRobin, seed, support_sets=draws) for seed in range(NUM_SEEDS)]
    settled = [outcome.after_share(workload.num_warmup / len(draws)) for outcome in outcomes]
    for row in _rows(settled, answers[workload.num_warmup :], scenario.shape):
        report.add(row)
    report.print()
    return 0


def _settings(workload: Workload, threads: int, *, is_quick: bool) -> Settings:
    """Return a server whose caches hold the cached sets of the workload."""
    shape = shape_of(workload)
    num_tokens = workload.cached_sets * shape.set_tokens + workload.num_clients * shape.query_tokens
    return Settings(
        model=str(model_folder("tiny" if is_quick else "default")),
        num_threads=threads,
        media_cache_mb=-(-workload.cache_pages * PAGE_BYTES // MIB),
        kv_cache_mb=-(-num_tokens * TOKEN_BYTES // MIB),
        host_media_mb=workload.host_media_mb,
        max_model_len=256,
        step_time_target=STEP_TIME_TARGET,
    )


def _sizes(target: Target) -> CacheSizes:
    engine = target.send(get("/version")).json()["engine"]
    return CacheSizes(pages=engine["num_media_slots"], host=0, tokens=engine["num_blocks"] * engine["block_size"])


def _scenario(workload: Workload) -> Scenario:
    return Scenario(
        num_replicas=1,
        num_requests=workload.num_warmup + workload.num_requests,
        num_sets=workload.num_sets,
        exponent=workload.exponent,
        shape=shape_of(workload),
        sizes=CacheSizes(pages=0, host=0, tokens=0),
        clients=workload.num_clients,
    )


class Load:
    """Clients in closed loops that send the requests of a workload to a server."""

    def __init__(self, target: Target, workload: Workload) -> None:
        self._target = target
        self._workload = workload
        client = Client(target.port)
        sets = SupportSets(client)
        self._names = [sets.create(workload.num_shots) for _ in range(workload.num_sets)]
        client.close()
        self._draws = workload.draws(0)
        self._pending = iter(enumerate(self._draws))  # shared by the clients, each of which takes the next
        self._answers: dict[int, Answer] = {}

    def run(self) -> list[Answer]:
        """Return the answers in the order of the requests. Raises `BenchFailed` if a client failed."""
        clients = [threading.Thread(target=partial(self._send, seed)) for seed in range(self._workload.num_clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        if len(self._answers) < len(self._draws):
            raise BenchFailed("a client has ended before its last request")
        return [self._answers[number] for number in sorted(self._answers)]

    def _send(self, seed: int) -> None:
        client = Client(self._target.port)
        sets = SupportSets(client, seed=seed + 2)
        for number, support_set in self._pending:
            self._answers[number] = sets.ask(
                self._names[support_set], self._workload.num_shots, self._workload.max_tokens
            )
        client.close()


def _rows(outcomes: Sequence[Outcome], answers: Sequence[Answer], shape: Shape) -> Iterator[Row]:
    tokens = [answer.cached_tokens / shape.set_tokens for answer in answers]
    pages = [min(answer.num_cached_media, shape.shots) / shape.shots for answer in answers]
    seconds = [answer.seconds for answer in answers]
    yield _row("tokens cached", outcomes, lambda outcome: outcome.text_hit_rate, np.mean(tokens))
    yield _row("pages cached", outcomes, lambda outcome: outcome.present_rate, np.mean(pages))
    yield _row("first token, mean s", outcomes, lambda outcome: float(outcome.first_token.mean()), np.mean(seconds))
    for percent in (50, 95):
        percentile = partial(Outcome.percentile, percent=percent)
        yield _row(f"first token, p{percent} s", outcomes, percentile, np.percentile(seconds, percent))


def _row(what: str, outcomes: Sequence[Outcome], measure: Measure, measured: np.floating[Any]) -> Row:
    simulated, value = float(np.mean(sample(outcomes, measure).values)), float(measured)
    return {"what": what, "simulated": simulated, "measured": value, "ratio": simulated / value if value else None}
