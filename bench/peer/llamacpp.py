"""Text alone, against llama.cpp: `python -m bench.peer llamacpp`.

Our default model without media and llama.cpp on the file that it was converted from, on as many threads, by turns:
tokens a second when one sequence and when several decode, and of a prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing

import torch

from bench.drive import Driver, Outcome
from bench.options import parse, server_settings, shown
from bench.peer.llamacpp_model import LlamaCpp
from bench.table import Bar, Report, Run, interleave
from bench.where import decode_step
from bench.workload import greedy, text
from model.prompt import EncodedPrompt
from model.tokenizer import PromptTokenizer
from model.zoo.config import LANGUAGE_MODEL_FILE
from model.zoo.default import find, prepare
from server.engine.build import build
from server.served_model import ServedModel
from server.wire import Generate

QUICK = {"repeats": 1, "prompt_tokens": 8, "new_tokens": 4, "prefill_tokens": 32}
PACKAGES = ("llama-cpp-python", LANGUAGE_MODEL_FILE.distribution)
# ours / llama.cpp
DECODE_BARS = {1: 1.0, 8: 1.5}
PREFILL_BAR = 2.5


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    settings = server_settings(options, prepare())
    engine, info = build(settings)
    report = Report(
        "Text alone, beside llama.cpp, tokens a second", {**shown(options), "dtype": info["dtype"]}, PACKAGES
    )
    model = ServedModel.load(settings)
    bench = Bench(options, model.tokenizer, Driver(engine), report)
    for batch in DECODE_BARS:
        bench.where(batch, model.config.language_model.num_layers)
        bench.decode(batch)
    bench.prefill()
    report.print()
    return 0


class Bench:
    def __init__(self, options: argparse.Namespace, tokenizer: PromptTokenizer, engine: Driver, report: Report) -> None:
        self.report = report
        self._options = options
        self._tokenizer = tokenizer
        self._engine = engine
        self._num_texts = 0
        self._agreed: list[bool] = []

    def decode(self, batch: int) -> None:
        name, length = f"decode, batch {batch}", self._options.prompt_tokens
        self._measure(name, batch, length, self._options.new_tokens, DECODE_BARS[batch])

    def where(self, batch: int, num_layers: int) -> None:
        """Our side's operators, beside the settings at the head of the table."""
        requests = [_request(str(i), self._prompt(self._options.prompt_tokens), 4) for i in range(batch)]
        for name, value in decode_step(self._engine.engine, requests, num_layers).items():
            self.report.settings[f"{name}, batch {batch}"] = value

    def prefill(self) -> None:
        length = self._options.prefill_tokens
        self._measure(f"prefill, {length} tokens", 1, length, 1, PREFILL_BAR)

    def _measure(self, name: str, batch: int, length: int, max_tokens: int, at_least: float) -> None:
        file, threads = find(LANGUAGE_MODEL_FILE), torch.get_num_threads()
        room = LlamaCpp(file, num_threads=threads, num_sequences=batch, length=length + max_tokens)
        with closing(room) as peer:
            interleave([self._round(peer, batch, length, max_tokens)])  # warm-up
            self._compare(peer, name, batch, length, max_tokens, at_least)

    def _compare(self, peer: LlamaCpp, name: str, batch: int, length: int, max_tokens: int, at_least: float) -> None:
        self._agreed.clear()
        rates = interleave(self._round(peer, batch, length, max_tokens) for _ in range(self._options.repeats))
        ratio = rates["ours"].over(rates["llama.cpp"])
        self.report.add(
            {
                "what": name,
                "ours": rates["ours"].median,
                "llama.cpp": rates["llama.cpp"].median,
                "ratio": ratio.median,
                "seen": ratio.spread(),
                "same first token": f"{sum(self._agreed)} of {len(self._agreed)}",
            }
        )
        self.report.bars.append(Bar(name=f"{name}, ours / llama.cpp", value=ratio.median, at_least=at_least))

    def _round(self, peer: LlamaCpp, batch: int, length: int, max_tokens: int) -> Mapping[str, Run]:
        """The same prompts, new to both."""
        prompts = [self._prompt(length) for _ in range(batch)]
        requests = [_request(str(i), prompt, max_tokens) for i, prompt in enumerate(prompts)]
        first: list[list[int]] = []

        def measure(outcome: Outcome) -> float:
            first.append([trace.token_ids[0] for trace in outcome.traces])
            self._agreed += [a == b for a, b in zip(*first, strict=True)] if len(first) == 2 else []
            if max_tokens > 1:
                return outcome.decode_tokens_per_second
            return batch * length / max(outcome.first_token.values)

        return {
            "ours": lambda: measure(self._engine.run(requests, {}, batch)),
            "llama.cpp": lambda: measure(peer.run(prompts, max_tokens)),
        }

    def _prompt(self, length: int) -> list[int]:
        token_ids: list[int] = []
        while len(token_ids) < length:
            self._num_texts += 1
            token_ids += self._tokenizer.encode_plain(text(self._num_texts) + " ")
        return token_ids[:length]


def _request(request_id: str, token_ids: list[int], max_tokens: int) -> Generate:
    return Generate(
        request_id=request_id,
        prompt=EncodedPrompt(token_ids=token_ids, media_index=[-1] * len(token_ids), media=[]),
        sampling=greedy(max_tokens),
    )


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.peer llamacpp", description=__doc__)
    made.add_argument("--prompt-tokens", type=int, default=32, help="before the decoded ones (default: 32)")
    made.add_argument("--new-tokens", type=int, default=64, help="decoded tokens of a sequence (default: 64)")
    made.add_argument("--prefill-tokens", type=int, default=512, help="of the prompt that is timed (default: 512)")
    return made
