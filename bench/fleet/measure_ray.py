"""Measures what a request costs that comes through Ray, and what an idle fleet costs: `python -m bench.fleet.measure_ray`.

`python -m bench.fleet --measure-ray` runs it. One client sends requests to the fleet of `bench.ray`, so that at most one
replica works; the costs are processor time of all processes of the fleet.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from bench.fewshot import Client
from bench.fleet.costs import FILE, load
from bench.fleet.measure import HttpCosts, http_options, processor_seconds
from bench.options import add_model, parse
from bench.ray import fleet_flags
from bench.ray_fleet import Fleet, running
from bench.ray_workload import Workload

QUICK = {"model": "tiny", "http_counts": [1, 2], "requests": 2, "idle_seconds": 1.0}
NUM_REPLICAS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), ["--threads", "1", *(sys.argv[1:] if arguments is None else arguments)], QUICK)
    with running(fleet_flags(options, Workload())) as fleet:
        print(json.dumps(measure(fleet, options)))
    return 0


def measure(fleet: Fleet, options: argparse.Namespace) -> dict[str, float]:
    """Return the costs under their names in a table. The time of the idle fleet is not counted as that of requests."""
    idle_cores = _idle_cores(fleet, options.idle_seconds)

    def clock() -> float:
        return processor_seconds(fleet.processes) - idle_cores * time.perf_counter()

    steps = load(options.costs_file, options.costs)
    with closing(Client(fleet.port)) as client:
        costs = HttpCosts(client, clock, steps, options).measure()
    return {"ray_request": costs.request, "ray_idle_cores": idle_cores}


def _idle_cores(fleet: Fleet, seconds: float) -> float:
    time.sleep(seconds)  # until the fleet has settled
    before = processor_seconds(fleet.processes)
    time.sleep(seconds)
    return (processor_seconds(fleet.processes) - before) / seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet.measure_ray", description=__doc__)
    add_model(parser, "default")
    http_options(parser)
    parser.add_argument(
        "--replicas", type=int, default=NUM_REPLICAS, help=f"number of replicas (default: {NUM_REPLICAS})"
    )
    parser.add_argument("--idle-seconds", type=float, default=20.0, help="how long the fleet is idle (default: 20)")
    parser.add_argument("--costs-file", type=Path, default=FILE, help="tables of the costs of an engine's steps")
    parser.add_argument("--costs", default="one core", help="name of a table in the file (default: 'one core')")
    return parser


if __name__ == "__main__":
    sys.exit(main())
