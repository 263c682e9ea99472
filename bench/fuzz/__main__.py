"""Random input for every door of the server: `python -m bench.fuzz api|media|bodies|wire|checkpoints`.

Every input comes from a seed, so a failure can be repeated. The exit status is 1 if an input ended a process, left memory
behind, or failed with anything but an error of ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bench.fuzz import api
from bench.options import model_folder
from bench.table import Report
from bench.target import Target, running
from server.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    report = _run(options)
    report.print()
    return int(not all(bar.is_met for bar in report.bars))


def _run(options: argparse.Namespace) -> Report:
    with _target(options) as target:
        return api.run(target, options.cases, seed=options.seed)


@contextmanager
def _target(options: argparse.Namespace) -> Iterator[Target]:
    if options.port is not None:
        yield Target(options.port)
        return
    settings = Settings(model=str(model_folder(options.model)), num_threads=1, decode_processes=1)
    with running(settings) as target:
        yield target


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    doors = parser.add_subparsers(dest="door", required=True)
    door = doors.add_parser("api", help="requests made from the OpenAPI document, by schemathesis")
    door.add_argument("--cases", type=int, default=20_000, help="cases to send (default: 20,000)")
    for door in doors.choices.values():
        door.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
        door.add_argument("--model", default="tiny", help="the model of the server (default: tiny)")
        door.add_argument("--port", type=int, help="use the server at this port instead of starting one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
