"""Measures the costs of an engine's steps and of HTTP: a table for the simulation, printed as JSON in the last line.

`python -m bench.fleet --measure` runs it, in one or several processes at the same time. The seconds of an image, for
example, are those of a prompt with new images minus those of one with cached pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import psutil

from bench.driver import Driver
from bench.fewshot import Client
from bench.fleet.costs import Costs, as_json
from bench.fleet.support_sets import SupportSets
from bench.options import add_model, model_folder, parse, server_settings
from bench.table import machine
from bench.target import running
from bench.workload import Prompt, Prompts, Shot, frames_of, greedy, random_image
from server.engine.build import build
from server.engine.device.runner import Launched, Runner
from server.engine.plan import Plan
from server.served_model import ServedModel
from server.settings import Settings

QUICK = {
    "model": "tiny",
    "counts": [1, 2],
    "rows": [1, 2],
    "http_counts": [1, 2],
    "repeats": 1,
    "requests": 2,
    "media_cache_mb": 1,
}
Clock = Callable[[], float]
STEP_SECONDS = 60.0
NEW_TOKENS = 16
SEEN_SEED = 1 << 20
# an unrelated prompt with so many images takes all slots of the small media cache
FLUSH = 16


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    settings = server_settings(
        options,
        model_folder(options.model),
        media_cache_mb=options.media_cache_mb,
        kv_cache_mb=512,
        speculative_tokens=0,
    )
    engine_costs = EngineCosts(settings, options)
    print(json.dumps(as_json(with_http(engine_costs.measure(), settings, options))))
    return 0


class EngineCosts:
    """Measures the steps of an engine in this process, whose media cache holds few pages."""

    def __init__(self, settings: Settings, options: argparse.Namespace) -> None:
        # all that is ready runs in one step
        engine, _ = build(settings.model_copy(update={"step_time_target": STEP_SECONDS}))
        self._steps = engine.runner = TimedRunner(engine.runner, clock_of(options))
        self._served = ServedModel.load(settings)
        self._driver = Driver(engine)
        self._prompts = Prompts(self._served.tokenizer)
        self._options = options
        self._seen = random_image(SEEN_SEED)
        self._number = 0

    def measure(self) -> Costs:
        self._prompt_seconds(self._prompts.new_prompt(self._prompts.new_support_set(FLUSH)))  # warm-up
        counts = self._options.counts
        rounds = [[self._times(count) for count in counts] for _ in range(self._options.repeats)]
        cold, cached, rebuilt = np.median(np.array(rounds), axis=0).T
        lengths = [self._num_tokens(count) for count in counts]
        return Costs(
            decode=tuple((rows, self._decode(rows)) for rows in self._options.rows),
            prompt=((self._num_tokens(0), self._shortest()), *zip(lengths, cached.tolist(), strict=True)),
            images=tuple(zip(counts, (cold - cached).tolist(), strict=True)),
            page=max(float(rebuilt[-1] - cached[-1]) / counts[-1], 0.0),
            request=0.0,
            transfer=0.0,
            conditions=machine(()),
        )

    def _times(self, count: int) -> tuple[float, float, float]:
        """Return the seconds of a prompt with new texts on new images, on cached pages, and on cached visual tokens."""
        shots = self._prompts.new_support_set(count)
        self._shortest_once()  # the query's image has its page
        cold = self._prompt_seconds(self._new_texts(shots))
        cached = self._prompt_seconds(self._new_texts(shots))
        for _ in range(2):
            self._prompt_seconds(self._prompts.new_prompt(self._prompts.new_support_set(FLUSH)))
        self._shortest_once()
        return cold, cached, self._prompt_seconds(self._new_texts(shots))

    def _new_texts(self, shots: Sequence[Shot]) -> Prompt:
        """Return a prompt that shows the images with new texts, and a query image that is cached."""
        texts = self._prompts.new_support_set(len(shots))
        pairs = zip(shots, texts, strict=True)
        return self._prompts.new_prompt(tuple(Shot(shot.image, text.text) for shot, text in pairs), self._seen)

    def _shortest(self) -> float:
        self._shortest_once()
        return statistics.median(self._shortest_once() for _ in range(3 * self._options.repeats))

    def _shortest_once(self) -> float:
        return self._prompt_seconds(self._prompts.new_prompt((), self._seen))

    def _num_tokens(self, count: int) -> int:
        prompt = self._new_texts(self._prompts.new_support_set(count))
        return len(prompt.request("", self._served.tokenizer, greedy(1)).prompt.token_ids)

    def _prompt_seconds(self, prompt: Prompt) -> float:
        return sum(seconds for _, seconds in self._run([prompt], 1))

    def _decode(self, rows: int) -> float:
        """Return the seconds of a step in which so many rows decode after a prompt with shots."""
        steps = [self._run(self._prompts.sharing_shots(rows, 4), NEW_TOKENS) for _ in range(self._options.repeats)]
        return statistics.median(seconds for run in steps for plan, seconds in run if is_decoding(plan, rows))

    def _run(self, prompts: Sequence[Prompt], new_tokens: int) -> list[tuple[Plan, float]]:
        """Run prompts, and return their steps with their seconds."""
        self._number += 1
        tokenizer = self._served.tokenizer
        requests = [p.request(f"{self._number}-{i}", tokenizer, greedy(new_tokens)) for i, p in enumerate(prompts)]
        self._steps.seconds.clear()
        self._driver.run(requests, frames_of(prompts, self._served.config.vision), len(prompts))
        return self._steps.seconds


class TimedRunner(Runner):
    """A runner that records the time of its steps."""

    def __init__(self, runner: Runner, clock: Clock) -> None:
        self._runner = runner
        self._clock = clock
        self.seconds: list[tuple[Plan, float]] = []

    def launch(self, plan: Plan, before: Launched | None = None) -> Launched:
        began = self._clock()
        launched = self._runner.launch(plan, before)
        launched.results()  # waits for the device
        self.seconds.append((plan, self._clock() - began))
        return launched


def is_decoding(plan: Plan, rows: int) -> bool:
    """Return whether so many rows decode in a step, and nothing else happens in it."""
    return len(plan.rows) == rows and not plan.pieces and all(row.count == 1 for row in plan.rows)


def clock_of(options: argparse.Namespace) -> Clock:
    """Return the clock of this process: with one thread its processor time, which other programs do not affect."""
    return time.process_time if options.threads == 1 else time.perf_counter


def with_http(costs: Costs, settings: Settings, options: argparse.Namespace) -> Costs:
    """Return the costs with those of HTTP: the seconds that a server takes beyond its engine's steps."""
    with running(settings) as target:
        clock = time.perf_counter if options.threads != 1 else partial(processor_seconds, target.processes)
        with closing(Client(target.port)) as client:
            return HttpCosts(client, clock, costs, options).measure()


def processor_seconds(processes: Callable[[], Sequence[psutil.Process]]) -> float:
    """Return the processor time of processes so far."""
    times = [process.cpu_times() for process in processes()]
    return sum(spent.user + spent.system for spent in times)


class HttpCosts:
    """Measures a server, one request at a time; `costs` are those of the engine's steps."""

    def __init__(self, client: Client, clock: Clock, costs: Costs, options: argparse.Namespace) -> None:
        self._sets = SupportSets(client)
        self._now = clock
        self._costs = costs
        self._options = options

    def measure(self) -> Costs:
        self._beyond_steps(1)  # warm-up
        cold, warm = zip(*(self._beyond_steps(count) for count in self._options.http_counts), strict=True)
        transfer = np.polyfit(self._options.http_counts, cold, 1)[0]
        return replace(self._costs, request=max(statistics.mean(warm), 0.0), transfer=max(float(transfer), 0.0))

    def _beyond_steps(self, count: int) -> tuple[float, float]:
        """Return the seconds that a cold and then a warm request with so many shots take beyond the engine's steps."""
        support_sets = [self._sets.create(count) for _ in range(self._options.requests)]
        return self._ask_all(support_sets, count, count + 1), self._ask_all(support_sets, count, 1)

    def _ask_all(self, support_sets: Sequence[str], count: int, num_images: int) -> float:
        began = self._now()
        answers = [self._sets.ask(support_set, count) for support_set in support_sets]
        seconds = (self._now() - began) / len(answers)
        tokens = round(statistics.mean(answer.computed_tokens for answer in answers))
        return seconds - self._costs.media(num_images, 0) - self._costs.forward(0, tokens)


def http_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `HttpCosts`."""
    parser.add_argument("--http-counts", type=int, nargs="+", default=[1, 4, 8], help="shots of requests over HTTP")
    parser.add_argument("--requests", type=int, default=12, help="requests over HTTP per number of shots")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet.measure", description=__doc__)
    add_model(parser, "default")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="images in an engine's prompts")
    http_options(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8], help="rows that decode in a step")
    parser.add_argument("--media-cache-mb", type=int, default=16, help="a small media cache, which overflows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
