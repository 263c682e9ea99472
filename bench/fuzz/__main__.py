"""Sends random input to every interface of the server: `python -m bench.fuzz api|media|bodies|wire|checkpoints|grammars`.

Every input is generated from a seed, so a failure can be repeated. The exit status is 1 if an input ended a process, leaked
memory, or failed with anything but one of the server's own errors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bench.fuzz import api, bodies, checkpoints, grammars, isolated, media, wire
from bench.options import model_folder
from bench.table import Report
from bench.target import Target, running
from server.settings import Settings

# numbers of inputs, in total more than 100,000
INPUTS = {"media": 40_000, "bodies": 20_000, "wire": 40_000, "checkpoints": 10_000, "grammars": 20_000}
HELP = {
    "media": "mutated images and videos, for a decode process",
    "bodies": "mutated JSON bodies, for a server",
    "wire": "mutated messages between the processes",
    "checkpoints": "mutated model folders and checkpoints",
    "grammars": "mutated JSON schemas and regular expressions",
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    report = _run(options)
    report.print()
    return int(not all(bar.is_met for bar in report.bars))


def _run(options: argparse.Namespace) -> Report:
    if options.door == "api":
        with _target(options) as target:
            return api.run(target, options.cases, seed=options.seed)
    report = Report(f"Mutated {options.door}", {"inputs": options.inputs, "seed": options.seed})
    return _find(options).report(report)


def _find(options: argparse.Namespace) -> isolated.Tally:
    match options.door:
        case "media":
            return media.run(options.inputs, options.seed)
        case "bodies":
            with _target(options) as target:
                return bodies.run(target, options.inputs, options.seed)
        case "wire":
            return isolated.run(wire.make, options.inputs, options.seed)
        case "checkpoints":
            return isolated.run(checkpoints.make, options.inputs, options.seed)
        case _:
            return isolated.run(grammars.make, options.inputs, options.seed)


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
    for name, inputs in INPUTS.items():
        door = doors.add_parser(name, help=HELP[name])
        door.add_argument("--inputs", type=int, default=inputs, help=f"inputs to try (default: {inputs:,})")
    for door in doors.choices.values():
        door.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
        door.add_argument("--model", default="tiny", help="model of the server (default: tiny)")
        door.add_argument("--port", type=int, help="use the server at this port instead of starting one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
