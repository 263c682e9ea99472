"""Simulates fleets of replicas from measured costs: `python -m bench.fleet [STUDY...]`.

Prints a table per study (docs/scale.md). `--measure` measures the costs on this machine first, `--measure-ray` those of a
request through Ray, and `--predict-ray` predicts the results of `bench.ray`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.fleet import page, pictures
from bench.fleet.check import check
from bench.fleet.costs import FILE, CostsError, load
from bench.fleet.measuring import ALONE, SHARED, measure_ray, measure_tables
from bench.fleet.ray_run import predict
from bench.fleet.setup import SHAPE, Setup, cold_seconds, warm_seconds
from bench.fleet.studies import STUDIES
from bench.table import ROOT, Report, Row

PICTURES = ROOT / "docs" / "scale"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.studies) - STUDIES.keys():
        parser.error(f"unknown studies: {', '.join(sorted(unknown))}; the studies are {', '.join(STUDIES)}")
    if options.measure:
        measure_tables(options.costs_file, is_quick=options.quick)
        return 0
    if options.measure_ray:
        measure_ray(options.costs_file, is_quick=options.quick)
        return 0
    try:
        if options.check:
            return check(options)
        return predict(options) if options.predict_ray else _study(options)
    except CostsError as error:
        print(error, file=sys.stderr)
        return 2


def _study(options: argparse.Namespace) -> int:
    setup = _setup(options)
    report = Report("Fleets in simulated time", {**_settings(options), **_facts(setup)})
    for name in options.studies or STUDIES:
        for row in STUDIES[name](setup):
            report.add({"study": name, **row})
    report.print(heading="study")
    if options.write:
        _write(report.rows)
    return 0


def _setup(options: argparse.Namespace) -> Setup:
    return Setup(
        costs=load(options.costs_file, options.costs or ALONE),
        seeds=range(1 if options.quick else options.seeds),
        load=options.load,
        price=options.price,
        target=options.target,
        is_quick=options.quick,
    )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that affect the studies, under the names of the command line."""
    names = ("quick", "seeds", "load", "price", "target")
    return {**{name: getattr(options, name) for name in names}, "costs": options.costs or ALONE}


def _facts(setup: Setup) -> dict[str, str | float]:
    """Return what follows from the costs: requests of the studies, alone in an engine."""
    costs = setup.costs
    return {
        "costs are": "measured" if costs.is_measured else "hypothetical",
        "cold request ms": 1000 * cold_seconds(costs, SHAPE),
        "warm request ms": 1000 * warm_seconds(costs, SHAPE),
        "requests/s per replica": setup.rate,
    }


def _write(rows: Sequence[Row]) -> None:
    names = dict.fromkeys(str(row["study"]) for row in rows)
    tables = {
        name: [
            {column: cell for column, cell in row.items() if column != "study"} for row in rows if row["study"] == name
        ]
        for name in names
    }
    page.write(page.PAGE, tables)
    for name, table in tables.items():
        pictures.draw(name, table, PICTURES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet", description=__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--costs-file", type=Path, default=FILE, help="tables of costs (default: those measured here)")
    parser.add_argument(
        "--costs", help=f"name of a table in the file (default: {ALONE!r}, for the prediction {SHARED!r})"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="simulations per row (default: 3); the tables show medians"
    )
    parser.add_argument(
        "--load", type=float, default=0.8, help="utilisation of a replica if all requests were cold (default: 0.8)"
    )
    parser.add_argument("--price", type=float, default=0.10, help="price of a replica per hour (default: 0.10)")
    parser.add_argument("--target", type=float, default=1.5, help="p95 of the first token in seconds (default: 1.5)")
    parser.add_argument("--write", action="store_true", help="write the tables and pictures of docs/scale.md")
    parser.add_argument("--measure", action="store_true", help="measure the costs, and write them to the file")
    parser.add_argument(
        "--measure-ray", action="store_true", help="measure what Ray adds to a request, and write it to the file"
    )
    parser.add_argument("--check", action="store_true", help="compare one simulated replica with a real server")
    parser.add_argument("--predict-ray", action="store_true", help="predict the results of bench.ray")
    parser.add_argument("--quick", action="store_true", help="use toy sizes, to check that the command runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
