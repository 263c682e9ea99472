"""Compares the throughput of two checkouts over HTTP: `python -m bench.checkouts BEFORE [--concurrency 1 4]`.

A server of each checkout runs at the same time, and rounds of the same requests go to one and then to the other, so that
other load on the machine affects both. The image pixels and the shots of a round are new to both servers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bench.http import QUICK
from bench.options import add_model, as_settings, model_folder, parse, server_settings
from bench.serving import HttpDriver, serving
from bench.table import ROOT, Bar, Report, Run, interleave
from bench.workload import Prompts
from server.served_model import ServedModel

AT_LEAST = 0.97


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    settings = server_settings(options, model_folder(options.model))
    prompts = Prompts(ServedModel.load(settings).tokenizer)
    if options.model == "default":  # each checkout has its own
        settings = settings.model_copy(update={"model": None})
    report = Report("This checkout compared with another one", as_settings(options))
    with serving(settings, Path(options.before)) as before, serving(settings, ROOT) as after:
        rounds = partial(_round, {"before": before, "after": after}, prompts, options)
        interleave([rounds(2)])  # warm-up
        for concurrency in options.concurrency:
            _compare(report, rounds, concurrency, options.repeats)
    report.print()
    return 0


def _compare(report: Report, rounds: partial[Mapping[str, Run]], concurrency: int, repeats: int) -> None:
    rates = interleave(rounds(concurrency, is_reversed=bool(index % 2)) for index in range(repeats))
    ratio = rates["after"].over(rates["before"])
    report.add(
        {
            "clients": concurrency,
            "before tokens/s": rates["before"].median,
            "after tokens/s": rates["after"].median,
            "after / before": ratio.median,
            "range": ratio.spread(),
        }
    )
    report.bars.append(Bar(name=f"after / before at {concurrency} clients", value=ratio.median, at_least=AT_LEAST))


def _round(
    servers: Mapping[str, HttpDriver],
    prompts: Prompts,
    options: argparse.Namespace,
    concurrency: int,
    is_reversed: bool = False,
) -> Mapping[str, Run]:
    """Return a run per server of the same prompts, new to each server, in tokens per second."""
    requests = prompts.sharing_shots(options.requests, options.shots)
    num_tokens = len(requests) * options.new_tokens

    def run(server: HttpDriver) -> float:
        return num_tokens / server.run(requests, options.new_tokens, concurrency)

    runs = [(name, partial(run, server)) for name, server in servers.items()]
    return dict(reversed(runs) if is_reversed else runs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.checkouts", description=__doc__)
    parser.add_argument("before", help="folder of the other checkout")
    add_model(parser, "default")
    parser.add_argument("--shots", type=int, default=8, help="shots per prompt (default: 8)")
    parser.add_argument("--requests", type=int, default=12, help="requests per round (default: 12)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens per answer (default: 16)")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 4], help="numbers of clients, one row per number"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
