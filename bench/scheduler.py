"""Measures the cost of an engine step without the model: `python -m bench.scheduler`.

The engine's runner computes nothing and returns at once, so that only schedule, commit and emit remain. Every sequence
decodes one token per step after a prompt with shots, so blocks are filled and published as in production.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from bench import random_models
from bench.driver import BenchFailed, pixels
from bench.options import as_settings, parse
from bench.table import Bar, Report, Sample
from bench.workload import Prompts, frames_of, greedy
from model.config import FlamingoConfig
from model.inference import prepare_for_inference
from model.prompt import PromptTokenizer
from server.engine.config import EngineConfig
from server.engine.device.runner import Launched, Runner
from server.engine.device.sampler import Reading, Result
from server.engine.device.transfers import Downloads
from server.engine.engine import Engine
from server.engine.plan import Plan
from server.wire import MediaWanted

QUICK = {"sequences": [1, 8], "steps": 20, "shots": 1}
AT_MOST_MS = 1.0
LARGEST_BATCH = 256
BLOCK_SIZE = 16
TOKEN_ID = 5
NO_TOKENS = torch.empty(0)  # on the device: no step is launched ahead here


class FakeRunner(Runner):
    """A runner that returns a constant token for each sampling row, and records the times of its call and return."""

    def __init__(self) -> None:
        self.called = self.done = 0.0

    def launch(self, plan: Plan, before: Launched | None = None) -> Launched:
        self.called = time.perf_counter()
        results = [[Result(row, token_id=TOKEN_ID) if row.samples else Result(row)] for row in plan.rows]
        launched = Launched(plan, Downloads(), Reading(results, Downloads(), NO_TOKENS), set())
        self.done = time.perf_counter()
        return launched


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    report = Report("Cost of a scheduler step, in milliseconds", as_settings(options))
    for num_sequences in options.sequences:
        _measure(report, num_sequences, options)
    report.print()
    return 0


def _measure(report: Report, num_sequences: int, options: argparse.Namespace) -> None:
    runner, config = FakeRunner(), random_models.config("tiny", random_models.SIZES["tiny"])
    engine = _engine(config, num_sequences)
    engine.runner = runner
    _fill(engine, config, num_sequences, options)
    schedule, rest = zip(*(_timed_step(engine, runner) for _ in range(options.steps)), strict=True)
    if len(engine.scheduler.running) != num_sequences:
        raise BenchFailed(f"{len(engine.scheduler.running)} sequences run at the end, expected {num_sequences}")
    total = Sample(tuple(map(sum, zip(schedule, rest, strict=True))))
    report.add(
        {
            "sequences": num_sequences,
            "step": total.median,
            "p90": total.percentile(90),
            "max": max(total.values),
            "schedule": Sample(schedule).median,
            "commit and emit": Sample(rest).median,
        }
    )
    if num_sequences == LARGEST_BATCH:
        report.bars.append(Bar(name=f"step of {LARGEST_BATCH} sequences", value=total.median, at_most=AT_MOST_MS))


def _timed_step(engine: Engine, runner: FakeRunner) -> tuple[float, float]:
    """Return the milliseconds before the call of the runner, and those after its return."""
    began = time.perf_counter()
    engine.step()
    return 1000 * (runner.called - began), 1000 * (time.perf_counter() - runner.done)


def _engine(config: FlamingoConfig, num_sequences: int) -> Engine:
    longest = config.language_model.max_positions
    limits = EngineConfig(
        num_blocks=longest // BLOCK_SIZE + num_sequences * 64,
        block_size=BLOCK_SIZE,
        num_media_slots=2 * num_sequences + 64,
        max_sequences=num_sequences,
        max_tokens_per_step=max(512, num_sequences),
        max_model_len=longest,
    )
    tokenizer = PromptTokenizer.load(random_models.folder("tiny"), config.prompt)
    return Engine(prepare_for_inference(random_models.random_model(config)), tokenizer, limits)


def _fill(engine: Engine, config: FlamingoConfig, num_sequences: int, options: argparse.Namespace) -> None:
    """Add sequences, and step until all are running with their prompts computed."""
    tokenizer = PromptTokenizer.load(random_models.folder("tiny"), config.prompt)
    prompts = Prompts(tokenizer).sharing_shots(num_sequences, options.shots)
    frames = frames_of(prompts, config.vision)
    # The first sequences decode while the last ones wait for their images.
    sampling = greedy(options.steps + 2 * num_sequences + 64)
    for i, prompt in enumerate(prompts):
        engine.add(prompt.request(str(i), tokenizer, sampling))
    while engine.scheduler.waiting or any(s.num_output_tokens == 0 for s in engine.scheduler.running):
        for event in engine.step():
            if isinstance(event, MediaWanted):
                engine.supply(pixels(event.digest, frames[event.digest]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduler", description=__doc__)
    parser.add_argument(
        "--sequences",
        type=int,
        nargs="+",
        default=[1, 64, 256],
        help="numbers of running sequences, one row per number",
    )
    parser.add_argument("--steps", type=int, default=300, help="steps per row (default: 300)")
    parser.add_argument("--shots", type=int, default=8, help="shots per prompt (default: 8)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
