"""Evaluate a server on a benchmark of the paper: `flamboyance evaluate NAME --data DIR`, `python -m evaluation.benchmarks`.

Without a name, the benchmarks are listed, with the state of each one's data in a folder and what is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from evaluation.benchmarks.benchmark import Benchmark, load, names
from evaluation.benchmarks.data import state
from evaluation.benchmarks.items import DataMissing
from evaluation.benchmarks.runner import Options, run
from evaluation.benchmarks.scoring import METRICS
from evaluation.counts import at_least
from flamboyance_client import FlamboyanceError, NotAuthorised, NotConnected, TimedOut
from flamboyance_client.connection import BASE_URL

DESCRIPTION = (
    "Evaluate a server on a benchmark of the paper. Without a name, list the benchmarks and, with --data, the state of "
    "each one's data in the folder and what is missing."
)
OUT = Path("benchmark-results")
# the same variable as for the client's own commands; other users of the machine can read flags
KEY_VARIABLE = "FLAMBOYANCE_API_KEY"


def main(arguments: Sequence[str] | None = None, prog: str = "python -m evaluation.benchmarks") -> int:
    """Run the command and return its exit status: 1 for an error, a failed query or a score that cannot be computed."""
    options = _parser(prog).parse_args(arguments)
    try:
        if options.name is None:
            _print_list(options.data)
            return 0
        return _evaluate(load(options.name), options)
    except* BrokenPipeError:
        pass  # the reader of stdout has ended, such as `head`
    except* (ValueError, OSError, FlamboyanceError) as group:
        print(f"error: {_text(_first(group))}", file=sys.stderr)
    except* KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
    return 1


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _text(error: BaseException) -> str:
    """Return the message of an error; the client's own advice is only for code."""
    if isinstance(error, NotAuthorised):
        return f"{error.message}: pass --api-key or set {KEY_VARIABLE}"
    if isinstance(error, TimedOut):
        return f"{str(error).partition('. ')[0]}. The server may be overloaded or hang; its log may show why."
    if isinstance(error, NotConnected) and isinstance(error.__cause__, httpx.ConnectError):
        return f"{str(error).partition('. ')[0]}. Start a server there, or pass the address of another one as --server."
    return str(error)


def _evaluate(benchmark: Benchmark, options: argparse.Namespace) -> int:
    if options.data is None:
        raise ValueError("--data is required: the folder of the benchmark's files")
    shots = [*dict.fromkeys(options.shots or benchmark.shots)]
    values = vars(options) | {"shots": shots, "split": options.split or benchmark.split}
    del values["name"]
    report = asyncio.run(run(benchmark, Options(**values)))
    print(report.markdown())
    return int(any(result.num_failed or result.problem for result in report.results))


def _print_list(data: Path | None) -> None:
    if data is not None and not data.is_dir():
        raise DataMissing(f"{data} is not a folder")
    for name in names():
        benchmark = load(name)
        print(f"{name:14} {METRICS[benchmark.metric].title}, {benchmark.split}")
        if data is not None:
            print(f"{'':14} {state(benchmark, folder if (folder := data / name).is_dir() else data)}")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"the benchmark: {', '.join(names())}")
    parser.add_argument(
        "--data", type=Path, help="the folder of its annotation and media files; for a list, of all data"
    )
    parser.add_argument("--server", default=BASE_URL, help=f"the server's URL (default: {BASE_URL})")
    parser.add_argument(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        help=f"the server's API key, if it requires one (default: the variable {KEY_VARIABLE})",
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"the folder of answers and results (default: {OUT})")
    parser.add_argument("--shots", type=at_least(0), nargs="+", help="numbers of shots (default: the benchmark's)")
    parser.add_argument("--selection", choices=("random", "rices"), default="random", help="how shots are selected")
    parser.add_argument(
        "--wording", choices=("paper", "openflamingo"), default="paper", help="the words of the prompts"
    )
    parser.add_argument("--split", help="the split of the queries (default: the benchmark's)")
    parser.add_argument(
        "--support", type=at_least(1), help="examples that shots are selected from (default: the benchmark's)"
    )
    parser.add_argument("--limit", type=at_least(1), help="size of a random sample of the queries (default: all)")
    parser.add_argument(
        "--ensemble", action="store_true", help="average several orders of the shots, to rank candidates"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the shots and samples (default: 0)")
    parser.add_argument("--concurrency", type=at_least(1), default=8, help="queries at a time (default: 8)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
