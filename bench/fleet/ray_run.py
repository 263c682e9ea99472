"""Predicts the results of `bench.ray`: four replicas with one thread each, on two cores that all processes share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from bench.fleet.caches import CacheSizes, Shape
from bench.fleet.costs import Costs, load
from bench.fleet.fleet import Outcome, Scenario, simulate
from bench.fleet.measuring import SHARED
from bench.fleet.page import PAGE, write
from bench.fleet.policies import Deployed, MakePolicy, Random, RoundRobin
from bench.fleet.setup import SHAPE, Measure, sample
from bench.ray_workload import POLICIES, QUICK, Workload
from bench.table import Report, Row

FILE = Path(__file__).with_name("ray_prediction.json")
NUM_REPLICAS, NUM_CORES = 4, 2
TURNS_PER_POLICY = 9
MAKERS: Mapping[str, MakePolicy] = {"affinity": Deployed, "round_robin": RoundRobin, "random": Random}


def predict(options: argparse.Namespace) -> int:
    """Print the prediction; with `--write`, write it to a file and into the page."""
    costs = load(options.costs_file, options.costs or SHARED)
    workload = QUICK if options.quick else Workload()
    facts = {"workload": str(workload), "replicas": NUM_REPLICAS, "cores": NUM_CORES - costs.ray_idle_cores}
    report = Report("Prediction of bench.ray", {"quick": options.quick, "costs": options.costs or SHARED, **facts})
    for number, name in enumerate(POLICIES):
        turns = range(number, TURNS_PER_POLICY * len(POLICIES), len(POLICIES))
        report.add({"policy": name, **row(outcomes(workload, costs, MAKERS[name], turns))})
    report.print()
    if options.write:
        FILE.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        write(PAGE, {"prediction": report.rows})
    return 0


def outcomes(workload: Workload, costs: Costs, make_policy: MakePolicy, turns: Iterable[int]) -> list[Outcome]:
    """Simulate turns of the workload, and leave out the requests of their warm-up."""
    scenario, through_ray = scenario_of(workload, NUM_CORES - costs.ray_idle_cores), costs.through_ray()
    results = (
        simulate(scenario, through_ray, make_policy, turn, support_sets=list(workload.draws(turn))) for turn in turns
    )
    return [outcome.after_share(workload.num_warmup / scenario.num_requests) for outcome in results]


def shape_of(workload: Workload) -> Shape:
    return replace(SHAPE, shots=workload.num_shots, new_tokens=workload.max_tokens)


def scenario_of(workload: Workload, num_cores: float) -> Scenario:
    return Scenario(
        num_replicas=NUM_REPLICAS,
        num_requests=workload.num_warmup + workload.num_requests,
        num_sets=workload.num_sets,
        exponent=workload.exponent,
        shape=shape_of(workload),
        sizes=CacheSizes(pages=workload.cache_pages, host=0, tokens=workload.cache_tokens),
        clients=workload.num_clients,
        shared_cores=num_cores,
    )


def row(turns: Sequence[Outcome]) -> Row:
    """Return the means over the turns, with the ranges of the first two; `warm` and `cold` are as in bench.ray."""
    pages = sample(turns, lambda outcome: outcome.present_rate)
    first = sample(turns, lambda outcome: 1000 * outcome.percentile(50))
    return {
        "pages hit": float(np.mean(pages.values)),
        "range": pages.spread(),
        "first token ms": float(np.mean(first.values)),
        "range of it": first.spread(),
        "p95": _mean(turns, lambda outcome: 1000 * outcome.percentile(95)),
        "mean": _mean(turns, lambda outcome: 1000 * float(outcome.first_token.mean())),
        "warm ms": _mean(turns, partial(_median_ms, is_warm=True)),
        "cold ms": _mean(turns, partial(_median_ms, is_warm=False)),
        "images not encoded": _mean(turns, lambda outcome: outcome.page_hit_rate),
        "tokens cached": _mean(turns, lambda outcome: outcome.text_hit_rate),
    }


def _mean(turns: Sequence[Outcome], measure: Measure) -> float:
    return float(np.mean(sample(turns, measure).values))


def _median_ms(outcome: Outcome, *, is_warm: bool) -> float:
    """Return the median milliseconds of the requests whose shots all have pages, or of the others."""
    return 1000 * float(np.median(outcome.first_token[(outcome.absent == 0) == is_warm]))
