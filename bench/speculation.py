"""Measures the speed of greedy answers with and without proposed tokens: `python -m bench.speculation`.

Two engines of one model answer the same requests in alternation; each is first in every second round. The shots are
captions that share words, questions with short answers, or completed forms, and are cached; a text has no shots.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from msgspec.structs import replace

from bench.driver import Driver, Outcome
from bench.options import add_model, as_settings, model_folder, parse, server_settings
from bench.table import Bar, Report, Sample
from bench.workload import ADJECTIVES, LOCATIONS, NOUNS, VERBS, random_image
from model.prompt import EndOfChunk, Media, Segment, Text, encode
from server.engine.build import build
from server.served_model import ServedModel
from server.wire import Generate, Sampling

QUICK = {"model": "tiny", "shots": [1], "requests": 2, "new_tokens": 4, "batches": [1, 2], "repeats": 1}
# minimum relative to the rate without proposals
AT_LEAST = 0.97
SUBJECTS = ("The river", "A library", "My neighbour", "The first train", "Good bread", "The winter", "A teacher")
BEGINNINGS = ("changed when", "is known for", "was never", "reminds us of", "begins with", "depends on", "stands for")
PROPOSED, ACCEPTED = "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"

Draw = random.Random


@dataclass(frozen=True, slots=True)
class Case:
    """Requests of one kind: how many shots a prompt has, and the writer of a shot's text and of a query's."""

    name: str
    num_shots: int
    write: Callable[[Draw], tuple[str, str]]


def cases(num_shots: Sequence[int]) -> list[Case]:
    writers = {"captions": caption, "answers": question, "forms": form}
    few_shot = [Case(f"{name}, {k} shots", k, write) for name, write in writers.items() for k in num_shots]
    return [*few_shot, Case("text", 0, text)]


def caption(draw: Draw) -> tuple[str, str]:
    adjective, noun, verb, location = map(draw.choice, (ADJECTIVES, NOUNS, VERBS, LOCATIONS))
    return f"A photo of a {adjective} {noun} that {verb} {location}.", "A photo of"


def question(draw: Draw) -> tuple[str, str]:
    query = f"Question: what {draw.choice(VERBS)} {draw.choice(LOCATIONS)}? Answer:"
    return f"{query} a {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}.", query


def form(draw: Draw) -> tuple[str, str]:
    lines = f"a {draw.choice(NOUNS)}\nColour: {draw.choice(ADJECTIVES)}\nWhat it does: it {draw.choice(VERBS)}"
    return f"Picture of: {lines}\nWhere it is: {draw.choice(LOCATIONS)}", "Picture of:"


def text(draw: Draw) -> tuple[str, str]:
    return "", f"{draw.choice(SUBJECTS)} {draw.choice(BEGINNINGS)}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    bench = Speculation(options)
    for case in cases(options.shots):
        for batch in options.batches:
            bench.compare(case, batch)
    bench.report.print()
    return 0


class Speculation:
    """Measures both engines and collects the rows of the report."""

    def __init__(self, options: argparse.Namespace) -> None:
        settings = server_settings(options, model_folder(options.model))
        self.report = Report("Greedy answers with and without proposed tokens", as_settings(options))
        self._options = options
        self._model = ServedModel.load(settings)
        self._drivers = {
            name: Driver(build(settings.model_copy(update={"speculative_tokens": limit}))[0])
            for name, limit in (("without", 0), ("with", options.proposed))
        }
        self._numbers = count()

    def compare(self, case: Case, batch: int) -> None:
        """Measure one case, and add its row."""
        engine, repeats = self._drivers["with"].engine, self._options.repeats
        before = engine.gauges()
        rounds = [self._run_round(case, batch, number) for number in range(repeats)]
        after = engine.gauges()
        proposing, plain = ([outcomes[name] for outcomes in rounds] for name in ("with", "without"))
        ratio = _rates(proposing).over(_rates(plain))
        self.report.add(
            {
                "case": case.name,
                "batch": batch,
                "ms per token without": _milliseconds_per_token(plain),
                "with": _milliseconds_per_token(proposing),
                "tokens/s ratio": ratio.median,
                "range": ratio.spread(),
                "tokens": sum(outcome.num_tokens for outcome in proposing),
                "proposed": int(after[PROPOSED] - before[PROPOSED]),
                "accepted": int(after[ACCEPTED] - before[ACCEPTED]),
                "same answers": _share_of_same(proposing, plain),
            }
        )
        name = f"tokens/s with / without proposals, {case.name}, batch {batch}"
        self.report.bars.append(Bar(name=name, value=ratio.median, at_least=AT_LEAST))

    def _run_round(self, case: Case, batch: int, number: int) -> dict[str, Outcome]:
        """Return the outcomes of both engines for the same new requests, whose prompts are cached first."""
        requests, frames = self._requests(case, Draw(f"{case.name} {batch} {number}"))
        first_tokens = [
            replace(request, request_id=f"{request.request_id} first", sampling=replace(request.sampling, max_tokens=1))
            for request in requests
        ]
        names = ["without", "with"] if number % 2 else ["with", "without"]
        for name in names:
            self._drivers[name].run(first_tokens, frames, batch)
        return {name: self._drivers[name].run(requests, frames, batch) for name in names}

    def _requests(self, case: Case, draw: Draw) -> tuple[list[Generate], dict[bytes, np.ndarray]]:
        images = [random_image(draw.getrandbits(32)) for _ in range(case.num_shots + self._options.requests)]
        ends: list[Segment] = [EndOfChunk()] if self._model.tokenizer.prompt.end_of_chunk else []
        shots: list[Segment] = []
        for image in images[self._options.requests :]:
            shots += [Media(image.digest), Text(case.write(draw)[0]), *ends]
        requests = [
            self._request([*shots, *([Media(image.digest)] if shots else []), Text(case.write(draw)[1])])
            for image in images[: self._options.requests]
        ]
        return requests, {image.digest: image.frames(self._model.config.vision) for image in images}

    def _request(self, segments: list[Segment]) -> Generate:
        sampling = Sampling(max_tokens=self._options.new_tokens, temperature=0.0)
        prompt = encode(segments, self._model.tokenizer)
        return Generate(request_id=str(next(self._numbers)), prompt=prompt, sampling=sampling)


def _rates(outcomes: Sequence[Outcome]) -> Sample:
    return Sample(tuple(outcome.tokens_per_second for outcome in outcomes))


def _milliseconds_per_token(outcomes: Sequence[Outcome]) -> float:
    """Return the median over the rounds of the time of an answer after its first token, per token."""
    rounds = [[gap for trace in outcome.traces for gap in trace.gaps] for outcome in outcomes]
    return Sample(tuple(1000 * sum(gaps) / max(len(gaps), 1) for gaps in rounds)).median


def _share_of_same(outcomes: Sequence[Outcome], references: Sequence[Outcome]) -> float:
    pairs = [
        (trace.token_ids, expected.token_ids)
        for outcome, reference in zip(outcomes, references, strict=True)
        for trace, expected in zip(outcome.traces, reference.traces, strict=True)
    ]
    return sum(ids == expected_ids for ids, expected_ids in pairs) / len(pairs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__)
    add_model(parser, "default")
    parser.add_argument("--shots", type=int, nargs="+", default=[4, 16], help="numbers of shots (default: 4 16)")
    parser.add_argument("--proposed", type=int, default=4, help="proposed tokens per step at most (default: 4)")
    parser.add_argument("--requests", type=int, default=8, help="requests per round (default: 8)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens per answer at most (default: 32)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="requests at once (default: 1 8)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
