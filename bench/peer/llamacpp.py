"""Compare text-only requests with llama.cpp: `python -m bench.peer llamacpp`.

Our default model without media and llama.cpp on the file that the model was converted from run on the same number of
threads, in alternation. Rows are tokens per second: decoding one sequence, decoding several, and prefill.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing

import torch

from bench.driver import Driver, Outcome
from bench.options import as_settings, parse, server_settings
from bench.peer.llamacpp_model import LlamaCpp
from bench.profile_step import decode_step
from bench.table import Bar, Report, Run, interleave
from bench.workload import RandomTexts, text_request
from model.prompt import PromptTokenizer
from model.zoo.default import LANGUAGE_MODEL_FILE, expert_files, prepare
from server.engine.build import build
from server.served_model import ServedModel

QUICK = {"repeats": 1, "prompt_tokens": 8, "new_tokens": 4, "prefill_tokens": 32}
PACKAGES = ("llama-cpp-python",)
# Minimum ratios, ours / llama.cpp; decode by batch size.
DECODE_BARS = {1: 1.0, 8: 1.5}
PREFILL_BAR = 2.5


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    settings = server_settings(options, prepare(), speculative_tokens=0)
    engine, info = build(settings)
    facts = {**as_settings(options), "dtype": info["dtype"], "weights": LANGUAGE_MODEL_FILE.requirement}
    report = Report("Text-only requests compared with llama.cpp, in tokens per second", facts, PACKAGES)
    model = ServedModel.load(settings)
    bench = Bench(options, model.tokenizer, Driver(engine), report)
    for batch in DECODE_BARS:
        bench.profile(batch, model.config.language_model.num_layers)
        bench.decode(batch)
    bench.prefill()
    report.print()
    return 0


class Bench:
    """Measures both programs and collects the rows of the report."""

    def __init__(self, options: argparse.Namespace, tokenizer: PromptTokenizer, engine: Driver, report: Report) -> None:
        self.report = report
        self._options = options
        self._texts = RandomTexts(tokenizer)
        self._engine = engine
        self._agreed: list[bool] = []

    def decode(self, batch: int) -> None:
        name, length = f"decode, batch {batch}", self._options.prompt_tokens
        self._measure(name, batch, length, self._options.new_tokens, DECODE_BARS[batch])

    def profile(self, batch: int, num_layers: int) -> None:
        """Add the operators of our decode step to the settings at the head of the report."""
        requests = [text_request(str(i), self._texts.token_ids(self._options.prompt_tokens), 16) for i in range(batch)]
        for name, value in decode_step(self._engine.engine, requests, num_layers).items():
            self.report.settings[f"{name}, batch {batch}"] = value

    def prefill(self) -> None:
        length = self._options.prefill_tokens
        self._measure(f"prefill, {length} tokens", 1, length, 1, PREFILL_BAR)

    def _measure(self, name: str, batch: int, length: int, max_tokens: int, at_least: float) -> None:
        file, threads = expert_files().language_model, torch.get_num_threads()
        model = LlamaCpp(file, num_threads=threads, num_sequences=batch, length=length + max_tokens)
        with closing(model) as peer:
            interleave([self._round(peer, batch, length, max_tokens)])  # warm-up
            self._compare(peer, name, batch, length, max_tokens, at_least)

    def _compare(self, peer: LlamaCpp, name: str, batch: int, length: int, max_tokens: int, at_least: float) -> None:
        self._agreed.clear()
        rates = interleave(self._round(peer, batch, length, max_tokens) for _ in range(self._options.repeats))
        ratio = rates["ours"].over(rates["llama.cpp"])
        self.report.add(
            {
                "case": name,
                "ours": rates["ours"].median,
                "llama.cpp": rates["llama.cpp"].median,
                "ratio": ratio.median,
                "range": ratio.spread(),
                "same first token": f"{sum(self._agreed)} of {len(self._agreed)}",
            }
        )
        self.report.bars.append(Bar(name=f"{name}, ours / llama.cpp", value=ratio.median, at_least=at_least))

    def _round(self, peer: LlamaCpp, batch: int, length: int, max_tokens: int) -> Mapping[str, Run]:
        """Return runs of the same prompts, new to both programs."""
        prompts = [self._texts.token_ids(length) for _ in range(batch)]
        requests = [text_request(str(i), prompt, max_tokens) for i, prompt in enumerate(prompts)]
        first_tokens: list[list[int]] = []

        def measure(outcome: Outcome) -> float:
            first_tokens.append([trace.token_ids[0] for trace in outcome.traces])
            self._agreed += [a == b for a, b in zip(*first_tokens, strict=True)] if len(first_tokens) == 2 else []
            if max_tokens > 1:
                return outcome.decode_tokens_per_second
            return batch * length / max(outcome.first_token.values)

        return {
            "ours": lambda: measure(self._engine.run(requests, {}, batch)),
            "llama.cpp": lambda: measure(peer.run(prompts, max_tokens)),
        }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peer llamacpp", description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=32, help="prompt tokens, decode rows (default: 32)")
    parser.add_argument("--new-tokens", type=int, default=64, help="decoded tokens per sequence (default: 64)")
    parser.add_argument("--prefill-tokens", type=int, default=512, help="prompt tokens, prefill row (default: 512)")
    return parser
