"""Measures decoding after long prompts on a CPU: `python -m bench.contexts`.

The loop of paged attention is compared with the products of copied keys and values that a CPU without Numba computes; both
run in this process, in alternation. Several sequences have one long prompt and a last line of their own, as the queries of
a support set do. The floor is a step after short prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from unittest import mock

from bench.driver import Driver
from bench.options import add_model, as_settings, model_folder, parse, server_settings
from bench.table import Report, Sample, interleave
from bench.workload import RandomTexts, text_request
from kernels import paged_attention_cpu
from model.prompt import PromptTokenizer
from server.engine.build import build
from server.served_model import ServedModel

QUICK = {"repeats": 1, "model": "tiny", "batches": [1, 2], "contexts": [24], "new_tokens": 8}
SHORT, OWN = 16, 4  # tokens of a short prompt, and of each sequence's last line


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    settings = server_settings(options, model_folder(options.model), speculative_tokens=0)
    engine, info = build(settings)
    report = Report("Decoding after long prompts", {**as_settings(options), "dtype": info["dtype"]})
    bench = Bench(options, ServedModel.load(settings).tokenizer, Driver(engine))
    for batch in options.batches:
        short = bench.rates(batch, SHORT)["loop"]
        for context in options.contexts:
            bench.add_row(report, batch, context, short)
    report.print()
    return 0


class Bench:
    """Measures how many tokens per second a batch decodes after its prompts."""

    def __init__(self, options: argparse.Namespace, tokenizer: PromptTokenizer, driver: Driver) -> None:
        self._options, self._texts, self._driver = options, RandomTexts(tokenizer), driver

    def add_row(self, report: Report, batch: int, context: int, short: Sample) -> None:
        rates = self.rates(batch, context)
        ratio = rates["loop"].over(rates["products"])
        report.add(
            {
                "sequences": batch,
                "context": context,
                "loop tokens/s": rates["loop"].median,
                "products tokens/s": rates["products"].median,
                "loop / products": ratio.median,
                "range": ratio.spread(),
                "loop ms per step": 1000 * batch / rates["loop"].median,
                "floor ms": 1000 * batch / short.median,
            }
        )

    def rates(self, batch: int, context: int) -> dict[str, Sample]:
        runs = {"loop": lambda: self._rate(batch, context), "products": lambda: self._rate_of_products(batch, context)}
        interleave([runs])  # warm-up
        return interleave([runs] * self._options.repeats)

    def _rate_of_products(self, batch: int, context: int) -> float:
        with mock.patch.object(paged_attention_cpu, "use_compiled", return_value=False):
            return self._rate(batch, context)

    def _rate(self, batch: int, context: int) -> float:
        prompt = self._texts.token_ids(context - OWN)
        self._driver.run([text_request("prompt", prompt, 1)], {}, 1)  # the sequences share its blocks
        prompts = [prompt + self._texts.token_ids(OWN) for _ in range(batch)]
        requests = [text_request(str(i), prompt, self._options.new_tokens) for i, prompt in enumerate(prompts)]
        return self._driver.run(requests, {}, batch).decode_tokens_per_second


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.contexts", description=__doc__)
    add_model(parser, "default")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64], help="numbers of sequences")
    parser.add_argument("--contexts", type=int, nargs="+", default=[300, 1000, 1800], help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=100, help="decoded tokens per sequence (default: 100)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
