"""Measures an engine on a CPU next to busy programs: `OMP_PROC_BIND=true OMP_PLACES=cores python -m bench.neighbours`.

In each round, new few-shot prompts run one after the other, once with all threads in every step, and once with those that
`StepThreads` chooses. The two variables bind threads as those of a server.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from bench.driver import BenchFailed, Driver
from bench.options import add_model, as_settings, model_folder, parse, server_settings
from bench.table import Bar, Report, Run, interleave
from bench.workload import Prompts, frames_of, greedy
from server.engine.build import build
from server.engine.device.step_threads import StepThreads
from server.served_model import ServedModel
from server.settings import child_environment

QUICK = {"model": "tiny", "shots": 1, "requests": 2, "new_tokens": 2, "neighbours": [0, 1], "repeats": 1}
# otherwise a program would inherit the one processor to which this thread is bound
BUSY = """
import os
if hasattr(os, "sched_setaffinity"): os.sched_setaffinity(0, range(os.cpu_count()))
while True: pass
"""
# until the system has spread the programs over the processors
SETTLE_SECONDS = 1.0
# alone, to look at the threads costs nothing; next to programs, fewer threads are faster
AT_MOST_ALONE, AT_MOST = 1.03, 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    settings = server_settings(options, model_folder(options.model))
    engine, info = build(settings)
    binding = child_environment().get("OMP_PROC_BIND", "none")
    report = Report(
        "An engine next to busy programs", {**as_settings(options), "dtype": info["dtype"], "binding": binding}
    )
    bench = Neighbours(options, ServedModel.load(settings), Driver(engine))
    interleave([bench.round(), bench.round()])  # warm-up
    for number in options.neighbours:
        with _busy(number):
            bench.compare(report, number)
    report.print()
    return 0


class Neighbours:
    """Compares the times of requests with all threads and with chosen ones."""

    def __init__(self, options: argparse.Namespace, model: ServedModel, engine: Driver) -> None:
        self._options = options
        self._model = model
        self._driver = engine
        self._prompts = Prompts(model.tokenizer)
        self._threads = {"all": StepThreads(), "chosen": engine.engine.threads}

    def compare(self, report: Report, number: int) -> None:
        times = interleave(self.round() for _ in range(self._options.repeats))
        ratio = times["chosen"].over(times["all"])
        report.add(
            {
                "busy programs": number,
                "all threads, s": times["all"].median,
                "chosen threads, s": times["chosen"].median,
                "chosen / all": ratio.median,
                "range": ratio.spread(),
            }
        )
        name = f"time next to {number} busy programs, chosen threads / all"
        report.bars.append(Bar(name=name, value=ratio.median, at_most=AT_MOST if number else AT_MOST_ALONE))

    def round(self) -> Mapping[str, Run]:
        """Return runs that return the seconds per request."""
        return {name: partial(self._run, threads) for name, threads in self._threads.items()}

    def _run(self, threads: StepThreads) -> float:
        self._driver.engine.threads = threads
        torch.set_num_threads(threads.num_all)
        prompts = self._prompts.sharing_shots(self._options.requests, self._options.shots)
        sampling = greedy(self._options.new_tokens)
        requests = [prompt.request(str(i), self._model.tokenizer, sampling) for i, prompt in enumerate(prompts)]
        frames = frames_of(prompts, self._model.config.vision)
        return self._driver.run(requests, frames, 1).seconds / len(requests)


@contextmanager
def _busy(number: int) -> Iterator[None]:
    """Run programs that compute all the time, each with one thread."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        time.sleep(SETTLE_SECONDS)
        yield
        if any(program.poll() is not None for program in programs):
            raise BenchFailed("a busy program has ended")
    finally:
        for program in programs:
            program.kill()
            program.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.neighbours", description=__doc__)
    add_model(parser, "default")
    parser.add_argument("--shots", type=int, default=2, help="shots per prompt (default: 2)")
    parser.add_argument("--requests", type=int, default=32, help="requests per round (default: 32)")
    parser.add_argument("--new-tokens", type=int, default=4, help="tokens per answer (default: 4)")
    parser.add_argument(
        "--neighbours", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy programs, one row per number"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
