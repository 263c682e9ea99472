"""Measures replicas at one address over HTTP: `python -m bench.ray [--replicas 4]`.

Requests for support sets with Zipf popularity are routed by three policies in alternation: to the replica that caches the
set, to each replica in turn, or at random. Then, under a load of every kind of request, a replica is killed, and all
replicas are replaced.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from bench.driver import BenchFailed
from bench.faults.load import Load
from bench.options import add_model, as_settings, model_folder, parse
from bench.ray_fleet import REPLICA, Fleet, running
from bench.ray_workload import POLICIES, QUICK, STEP_TIME_TARGET, Policy, Workload
from bench.serving import DONE, HOST, REQUEST_SECONDS
from bench.table import Bar, Report, Row, Sample
from bench.target import image_part, post
from bench.workload import random_image, random_text

KV_BYTES_PER_TOKEN, PAGE_BYTES = 23_040, 786_432  # of the default model: docs/operations.md
LOAD_SECONDS = 20.0
MAX_MODEL_LEN = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A measured request: the time of its first token, and how many of its shots' pages were in the cache."""

    seconds: float
    shots_cached: int
    shots: int
    prompt_tokens: int
    replica: str


class Turn:
    """The requests of one turn of a policy, which stores its own support sets and draws from them."""

    def __init__(self, fleet: Fleet, workload: Workload, number: int) -> None:
        self._fleet = fleet
        self._workload = workload
        self._number = number
        self._sets: list[str] = []

    def prepare(self) -> None:
        with ThreadPoolExecutor(self._workload.num_clients) as threads:
            self._sets = list(threads.map(self._store, range(self._workload.num_sets)))

    def run(self) -> list[Answer]:
        """Send all requests in closed loops, and return the answers that are measured."""
        draws = list(enumerate(self._workload.draws(self._number)))
        share = self._take_turns(iter(draws))
        with ThreadPoolExecutor(self._workload.num_clients) as threads:
            parts = list(threads.map(self._client, [share] * self._workload.num_clients))
        answers = dict(answer for part in parts for answer in part)
        return [answers[index] for index in range(self._workload.num_warmup, len(draws))]

    def _take_turns(self, draws: Iterator[tuple[int, int]]) -> Callable[[], tuple[int, int] | None]:
        lock = threading.Lock()

        def take() -> tuple[int, int] | None:
            with lock:
                return next(draws, None)

        return take

    def _client(self, take: Callable[[], tuple[int, int] | None]) -> list[tuple[int, Answer]]:
        connection = http.client.HTTPConnection(HOST, self._fleet.port, timeout=REQUEST_SECONDS)
        answers = []
        while (draw := take()) is not None:
            index, rank = draw
            answers.append((index, self._ask(connection, index, self._sets[rank])))
        connection.close()
        return answers

    def _ask(self, connection: http.client.HTTPConnection, index: int, support_set: str) -> Answer:
        image = image_part(random_image(self._seed(self._workload.num_sets * self._workload.num_shots + index)).data)
        body = {
            "examples": {"support_set": support_set, "k": self._workload.num_shots, "strategy": "first"},
            "query": {"media": [image]},
            "template": "caption",
            "max_tokens": self._workload.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began = time.perf_counter()
        connection.request("POST", "/v1/fewshot/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        first = response.readline()
        seconds = time.perf_counter() - began
        rest = response.read()
        if response.status != 200 or not rest.strip().endswith(DONE):
            raise BenchFailed(f"status {response.status}: {(first + rest)[-500:]!r}")
        usage = json.loads(rest.strip().split(b"\n\n")[-2].removeprefix(b"data: "))["usage"]
        details = usage["fewshot_details"]
        # the query's image is new, and always encoded
        shots_encoded = details["media_encoded"] - 1
        return Answer(
            seconds=seconds,
            shots=self._workload.num_shots,
            shots_cached=self._workload.num_shots - shots_encoded,
            prompt_tokens=usage["prompt_tokens"],
            replica=response.headers[REPLICA],
        )

    def _store(self, rank: int) -> str:
        """Store the set of a rank, and return its id."""
        seeds = [self._seed(rank * self._workload.num_shots + shot) for shot in range(self._workload.num_shots)]
        examples = [{"media": [image_part(random_image(seed).data)], "text": random_text(seed)} for seed in seeds]
        answer = self._fleet.target.send(post("/v1/support_sets", examples=examples), timeout=REQUEST_SECONDS)
        if answer.status != 200:
            raise BenchFailed(f"a support set was not stored: {answer.status} {answer.body[:300]!r} {answer.error}")
        set_id: str = answer.json()["id"]
        return set_id

    def _seed(self, index: int) -> int:
        return (self._workload.seed << 48) + (self._number << 24) + index


def measure(fleet: Fleet, workload: Workload, repeats: int, report: Report) -> None:
    """Run the policies by turns, and add a row for each."""
    answers: dict[Policy, list[list[Answer]]] = {policy: [] for policy in POLICIES}
    for number in range(repeats * len(POLICIES)):
        policy = POLICIES[number % len(POLICIES)]
        fleet.update(routing=policy)
        turn = Turn(fleet, workload, number)
        turn.prepare()
        answers[policy].append(turn.run())
    rates = {policy: Sample(tuple(map(hit_rate, turns))) for policy, turns in answers.items()}
    for policy, turns in answers.items():
        report.add(policy_row(policy, turns, rates))


def hit_rate(answers: Sequence[Answer]) -> float:
    return sum(answer.shots_cached for answer in answers) / sum(answer.shots for answer in answers)


def policy_row(policy: Policy, turns: Sequence[Sequence[Answer]], rates: Mapping[Policy, Sample]) -> Row:
    everything = [answer for turn in turns for answer in turn]
    all_ms = Sample(tuple(1000 * answer.seconds for answer in everything))
    warm = [1000 * answer.seconds for answer in everything if answer.shots_cached == answer.shots]
    cold = [1000 * answer.seconds for answer in everything if answer.shots_cached < answer.shots]
    by_replica = [sum(answer.replica == name for answer in everything) for name in {a.replica for a in everything}]
    return {
        "policy": policy,
        "requests": len(everything),
        "pages hit": rates[policy].median,
        "range": rates[policy].spread(),
        "first token ms": all_ms.median,
        "p95": all_ms.percentile(95),
        "warm ms": statistics.median(warm) if warm else None,
        "cold ms": statistics.median(cold) if cold else None,
        "prompt tokens": statistics.mean(answer.prompt_tokens for answer in everything),
        "busiest replica": max(by_replica) / len(everything),
    }


def disturb(fleet: Fleet, report: Report) -> None:
    """Kill a replica, and replace all, each under load; add a row and bars for each."""
    disturbances: dict[str, Callable[[], None]] = {
        "replica killed": lambda: fleet.process_of(fleet.replicas()[0]).kill(),
        "rolling update": lambda: fleet.update(generation=time.time_ns()),
    }
    for seed, (name, make) in enumerate(disturbances.items()):
        repeated = _repeated(fleet)
        load = Load(fleet.target, num_clients=4, seed=seed).start()
        time.sleep(LOAD_SECONDS / 4)
        make()
        time.sleep(LOAD_SECONDS)
        load.stop()
        row = load_row(name, load, fleet)
        # the count of a replica is lost with it
        report.add({**row, "repeated": sum(max(n - repeated.get(r, 0), 0) for r, n in _repeated(fleet).items())})
        report.bars.append(Bar(name=f"{name}: requests lost", value=float(row["lost"] or 0), at_most=0))
        report.bars.append(Bar(name=f"{name}: acknowledged and lost", value=float(row["gone"] or 0), at_most=0))


def load_row(name: str, load: Load, fleet: Fleet) -> dict[str, Any]:
    answers = [sent.answer for sent in load.sent]
    refused = [answer for answer in answers if 400 <= answer.status < 500]
    codes = Counter(f"{answer.status} {answer.json()['error']['code']}" for answer in refused)
    return {
        "disturbance": name,
        "sent": len(answers),
        "served": sum(200 <= answer.status < 300 for answer in answers),
        "refused": ", ".join(f"{number} x {code}" for code, number in codes.most_common()),
        "lost": sum(answer.status == 0 or answer.status >= 500 for answer in answers),
        "streams cut": sum(b'"replica_lost"' in answer.body and answer.status == 200 for answer in answers),
        "gone": len(load.lost(fleet.target)),
    }


def _repeated(fleet: Fleet) -> dict[str, float]:
    return fleet.counters("requests_repeated_total")["requests_repeated_total"]


def fleet_flags(options: argparse.Namespace, workload: Workload) -> dict[str, object]:
    """Return the flags of the fleet, with caches that hold only some of the sets, and one thread per replica."""
    flags: dict[str, object] = {
        "replicas": options.replicas,
        "model": model_folder(options.model),
        "num_threads": options.threads,
        "decode_processes": 1,
        "spare_worker": "false",
        "host_media_mb": workload.host_media_mb,
        "media_cache_mb": -(-workload.cache_pages * PAGE_BYTES // 2**20),
        "kv_cache_mb": -(-max(workload.cache_tokens, MAX_MODEL_LEN) * KV_BYTES_PER_TOKEN // 2**20),
        "max_model_len": MAX_MODEL_LEN,
        "max_client_share": 1,
        "step_time_target": STEP_TIME_TARGET,
    }
    return {**flags, **dict(options.settings)}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = [
        "--threads",
        "1",
        *(sys.argv[1:] if arguments is None else arguments),
    ]  # per replica; a later flag wins
    options = parse(_parser(), arguments, {"model": "tiny", "repeats": 1, "replicas": 2})
    workload = QUICK if options.quick else Workload()
    sizes = {"num_sets": options.sets, "num_requests": options.requests, "num_warmup": options.warmup}
    workload = replace(workload, **{name: value for name, value in sizes.items() if value is not None})
    report = Report("Replicas at one address", {**as_settings(options), "workload": str(workload)}, ("ray",))
    with running(fleet_flags(options, workload)) as fleet:
        if options.only != "disturbances":
            measure(fleet, workload, options.repeats, report)
        if options.only != "routing":
            disturb(fleet, report)
    report.print()
    return int(not all(bar.is_met for bar in report.bars))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.ray", description=__doc__)
    add_model(parser, "default")
    parser.add_argument("--replicas", type=int, default=4, help="number of replicas (default: 4)")
    parser.add_argument("--sets", type=int, help="number of support sets (default: 200)")
    parser.add_argument("--requests", type=int, help="measured requests per turn (default: 800)")
    parser.add_argument("--warmup", type=int, help="requests per turn before them (default: 400)")
    parser.add_argument("--only", choices=("routing", "disturbances"), help="one of the two parts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
