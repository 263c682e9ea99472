"""Measures the speed of the engine without HTTP: `python -m bench.offline [--model FOLDER]`.

Few-shot requests share one support set. For several numbers of clients, a row reports the time to the first token, the time
between tokens, and tokens per second. The support set is new to the engine in each round, which computes it once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.driver import Driver, Outcome
from bench.options import add_model, as_settings, model_folder, parse, server_settings
from bench.table import Report, Sample
from bench.workload import Prompts, frames_of, greedy, mean_length
from server.engine.build import build
from server.served_model import ServedModel

QUICK = {"model": "tiny", "shots": 2, "requests": 4, "new_tokens": 3, "concurrency": [1, 4], "repeats": 2}
FACTS = ("dtype", "num_blocks", "num_media_slots", "max_model_len")
PERCENTILES = (50, 90, 99)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    bench = Offline(options)
    bench.run(2, 2)  # warm-up
    for concurrency in options.concurrency:
        outcomes = [bench.run(options.requests, concurrency) for _ in range(options.repeats)]
        bench.report.add({"clients": concurrency, "prompt tokens": bench.prompt_length, **_columns(outcomes)})
    bench.report.print()
    return 0


class Offline:
    """Runs rounds of few-shot requests on an engine in this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        settings = server_settings(options, model_folder(options.model))
        engine, info = build(settings)
        self.options = options
        self.model = ServedModel.load(settings)
        self.report = Report(
            "The engine without HTTP", {**as_settings(options), **{fact: info[fact] for fact in FACTS}}
        )
        self.prompt_length = 0.0
        self._driver = Driver(engine)
        self._prompts = Prompts(self.model.tokenizer)

    def run(self, num_requests: int, concurrency: int) -> Outcome:
        prompts = self._prompts.sharing_shots(num_requests, self.options.shots)
        sampling = greedy(self.options.new_tokens)
        requests = [prompt.request(str(i), self.model.tokenizer, sampling) for i, prompt in enumerate(prompts)]
        self.prompt_length = mean_length(requests)
        return self._driver.run(requests, frames_of(prompts, self.model.config.vision), concurrency)


def _columns(outcomes: Sequence[Outcome]) -> dict[str, float | str]:
    """Summarise rates per round, and times over the requests of all rounds."""
    rate = Sample(tuple(outcome.tokens_per_second for outcome in outcomes))
    first = Sample(tuple(t for outcome in outcomes for t in outcome.first_token.values))
    between = Sample(tuple(t for outcome in outcomes for t in outcome.between_tokens.values))
    return {
        "tokens/s": rate.median,
        "range": rate.spread(),
        **{f"first token p{p} ms": 1000 * first.percentile(p) for p in PERCENTILES},
        **{f"between p{p} ms": 1000 * between.percentile(p) for p in PERCENTILES if between.values},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.offline", description=__doc__)
    add_model(parser, "200m")
    parser.add_argument("--shots", type=int, default=8, help="shots per prompt (default: 8)")
    parser.add_argument("--requests", type=int, default=64, help="requests per row (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens per answer (default: 32)")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 4, 16], help="numbers of clients, one row per number"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
