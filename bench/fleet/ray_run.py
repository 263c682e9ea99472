"""A prediction of what `bench.ray` measures: four replicas with a thread each, on two cores that all processes share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from bench.fleet.caches import CacheSizes, Shape
from bench.fleet.costs import Costs, load
from bench.fleet.fleet import Outcome, Scenario, simulate
from bench.fleet.measuring import SHARED
from bench.fleet.policies import Deployed, MakePolicy, Random, RoundRobin
from bench.fleet.setup import SHAPE, Measure, sample
from bench.ray_workload import POLICIES, QUICK, Workload
from bench.table import Report, Row

FILE = Path(__file__).with_name("ray_prediction.json")
NUM_REPLICAS, NUM_CORES = 4, 2
NUM_SEEDS = 10
# Assumed, not measured: the way through Ray's proxy, a gateway and the replica's actor takes as much processor time as the
# server's own work on the request.
RAY_REQUESTS = 1.0
MAKERS: Mapping[str, MakePolicy] = {"affinity": Deployed, "round_robin": RoundRobin, "random": Random}


def predict(options: argparse.Namespace) -> int:
    """Print the prediction, and write it to a file."""
    costs = load(options.costs_file, options.costs or SHARED)
    workload = QUICK if options.quick else Workload()
    facts = {"workload": str(workload), "replicas": NUM_REPLICAS, "cores": NUM_CORES, "ray / request": RAY_REQUESTS}
    report = Report("Prediction of bench.ray", {"quick": options.quick, "costs": options.costs or SHARED, **facts})
    for name in POLICIES:
        report.add({"policy": name, **row(outcomes(workload, costs, MAKERS[name]))})
    report.print()
    if not options.quick:
        FILE.write_text(json.dumps(report.as_json(), indent=1, default=str) + "\n", encoding="utf-8")
    return 0


def outcomes(workload: Workload, costs: Costs, make_policy: MakePolicy) -> list[Outcome]:
    """Simulate turns of the workload with different draws, and leave out the requests of their warm-up."""
    scenario, costs = scenario_of(workload), with_ray(costs)
    turns = (
        simulate(scenario, costs, make_policy, turn, support_sets=list(workload.draws(turn)))
        for turn in range(NUM_SEEDS)
    )
    return [turn.after_share(workload.num_warmup / scenario.num_requests) for turn in turns]


def shape_of(workload: Workload) -> Shape:
    return replace(SHAPE, shots=workload.num_shots, new_tokens=workload.max_tokens)


def scenario_of(workload: Workload) -> Scenario:
    shape = shape_of(workload)
    return Scenario(
        num_replicas=NUM_REPLICAS,
        num_requests=workload.num_warmup + workload.num_requests,
        num_sets=workload.num_sets,
        exponent=workload.exponent,
        shape=shape,
        sizes=CacheSizes(
            pages=workload.cache_pages,
            host=0,
            tokens=workload.cached_sets * shape.set_tokens + workload.num_clients * shape.query_tokens,
        ),
        clients=workload.num_clients,
        shared_cores=NUM_CORES,
    )


def with_ray(costs: Costs) -> Costs:
    """Return the costs of a request that comes through Ray."""
    return costs.scaled_request(1 + RAY_REQUESTS)


def row(turns: Sequence[Outcome]) -> Row:
    """Return the means over the turns, with the range of the mean time."""
    mean_ms = sample(turns, lambda outcome: 1000 * float(outcome.first_token.mean()))
    return {
        "pages cached": _mean(turns, lambda outcome: outcome.present_rate),
        "images not encoded": _mean(turns, lambda outcome: outcome.page_hit_rate),
        "tokens cached": _mean(turns, lambda outcome: outcome.text_hit_rate),
        "first token, warm ms": _mean(turns, partial(_mean_of, is_warm=True)),
        "first token, other ms": _mean(turns, partial(_mean_of, is_warm=False)),
        "first token, mean ms": float(np.mean(mean_ms.values)),
        "range of turns": mean_ms.spread(),
        "p50 ms": _mean(turns, lambda outcome: 1000 * outcome.percentile(50)),
        "p95 ms": _mean(turns, lambda outcome: 1000 * outcome.percentile(95)),
    }


def _mean(turns: Sequence[Outcome], measure: Measure) -> float:
    return float(np.mean(sample(turns, measure).values))


def _mean_of(outcome: Outcome, *, is_warm: bool) -> float:
    """Return the mean milliseconds to the first token of the requests whose shots were all cached, or of the others."""
    return 1000 * float(outcome.first_token[(outcome.tokens == 0) == is_warm].mean())
