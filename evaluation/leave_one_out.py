"""`python -m evaluation.leave_one_out URL`: does a support set's own leave-one-out say how well it will do?

Support sets of held-out categories under words that the model has never seen are built on the server and evaluated there;
then fresh images of the same categories are classified with the same `examples`. A table sets estimate beside truth, for
each strategy and k, over all sets; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any, Literal

from evaluation.intervals import Share
from flamboyance_client import Client, Evaluation, Selection, example, query
from flamboyance_client.options import Weighing
from training.default.words import HELD_OUT_WORDS
from training.default_data.records import Record, read_records
from training.default_data.split import held_out

DATA = Path.home() / ".cache" / "flamboyance" / "default-data"
SEED = 29
POLL_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    url: str
    api_key: str | None
    data: Path
    domain: str
    sets: int
    ways: int
    examples: int
    fresh: int
    k: list[int]
    strategies: list[str]
    seeds: list[int]
    calibration: Literal["none", "contextual"]
    normalisation: Literal["sum", "mean"]
    permutations: int

    @property
    def weighing(self) -> Weighing:
        return {
            "calibration": self.calibration,
            "normalisation": self.normalisation,
            "permutations": self.permutations,
        }


@dataclass(frozen=True, slots=True)
class Drawn:
    """Images under the word that stands for their category: those of the support set, and those that it never holds."""

    examples: list[tuple[str, str]]
    fresh: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Compared:
    """One setting on one support set."""

    strategy: str
    k: int
    estimate: Share
    truth: Share

    @property
    def error(self) -> float:
        return self.estimate.value - self.truth.value


@dataclass(frozen=True, slots=True)
class Followed:
    """What following a recommendation gave, and what the best setting would have given, on fresh images."""

    truth: float
    best: float
    k: int


def categories(records: Sequence[Record], domain: str, least: int) -> dict[str, list[str]]:
    """Images by what they show: held-out drawings by label, photographs by category."""
    found: dict[str, list[str]] = {}
    for record in records:
        if domain == "photograph" and record.domain == domain and record.category:
            found.setdefault(record.category, []).append(record.image)
        elif domain == "drawing" and record.trains and record.label and held_out(record.label):
            found.setdefault(record.label, []).append(record.image)
    return {name: images for name, images in sorted(found.items()) if len(images) >= least}


def draw(usable: Mapping[str, list[str]], options: Options, number: int) -> Drawn:
    rng = Random(f"{SEED}/{options.domain}/{options.ways}/{number}")
    names, words = rng.sample(sorted(usable), options.ways), rng.sample(HELD_OUT_WORDS, options.ways)
    drawn = Drawn([], [])
    for name, word in zip(names, words, strict=True):
        images = [(image, word) for image in rng.sample(usable[name], options.examples + options.fresh)]
        drawn.examples.extend(images[: options.examples])
        drawn.fresh.extend(images[options.examples :])
    rng.shuffle(drawn.examples)
    return drawn


class Server:
    def __init__(self, options: Options, client: Client) -> None:
        self._options = options
        self._client = client

    def create(self, drawn: Drawn) -> str:
        examples = [example(self._options.data / image, label=word) for image, word in drawn.examples]
        return self._client.support_sets.create(examples=examples, ttl_seconds=24 * 3600).id

    def evaluate(self, support_set: str) -> Evaluation:
        asked = self._options
        found = self._client.support_sets.evaluate(
            support_set, k=asked.k, strategies=asked.strategies, seeds=asked.seeds, **asked.weighing
        )
        while not found.is_over:
            time.sleep(POLL_SECONDS)
            found = self._client.evaluations.get(found.id)
        if found.status != "completed":
            raise RuntimeError(f"evaluation {found.id} is {found.status}: {found.raw['error']}")
        return found

    def classify(self, selection: Selection, image: str) -> str:
        asked = query(self._options.data / image)
        return self._client.classify(asked, examples=selection, **self._options.weighing).label

    def forget(self, support_set: str) -> None:
        self._client.support_sets.delete(support_set)


def compare(server: Server, drawn: Drawn) -> tuple[list[Compared], Followed]:
    support_set = server.create(drawn)
    try:
        evaluation = server.evaluate(support_set)
        rows = [_compared(server, evaluation, cell, drawn) for cell in evaluation.cells]
    finally:
        server.forget(support_set)
    chosen = evaluation.raw["recommendation"]["examples"]
    settings = {
        (cell["strategy"], cell["k"], cell["seed"]): row for cell, row in zip(evaluation.cells, rows, strict=True)
    }
    followed = settings[chosen["strategy"], chosen["k"], chosen["seed"]]
    return rows, Followed(followed.truth.value, max(row.truth.value for row in rows), chosen["k"])


def _compared(server: Server, evaluation: Evaluation, cell: Mapping[str, Any], drawn: Drawn) -> Compared:
    selection: Selection = {
        "support_set": evaluation.raw["support_set"],
        "version": evaluation.raw["version"],
        "k": cell["k"],
        "strategy": cell["strategy"],
        "seed": cell["seed"],
    }
    right = sum(server.classify(selection, image) == word for image, word in drawn.fresh)
    estimate, truth = Share(cell["correct"], cell["queries"]), Share(right, len(drawn.fresh))
    return Compared(cell["strategy"], cell["k"], estimate, truth)


# the table


def by_setting(rows: Sequence[Compared]) -> Iterator[tuple[tuple[int, str], list[Compared]]]:
    for setting in sorted({(row.k, row.strategy) for row in rows}):
        yield setting, [row for row in rows if (row.k, row.strategy) == setting]


def summary(rows: Sequence[Compared]) -> dict[str, Any]:
    """`bias`: mean of estimate minus truth, with its standard error; `spread`: its standard deviation over sets, and the
    one that counting alone would give."""
    errors = [row.error for row in rows]
    spread = stdev(errors) if len(errors) > 1 else 0.0
    counting = fmean(_variance(row.estimate) + _variance(row.truth) for row in rows) ** 0.5
    truth = Share(sum(row.truth.right for row in rows), sum(row.truth.total for row in rows))
    low, high = truth.interval()
    return {
        "sets": len(rows),
        "estimate": fmean(row.estimate.value for row in rows),
        "truth": truth.value,
        "truth_interval": [low, high],
        "bias": fmean(errors),
        "bias_error": spread / len(errors) ** 0.5,
        "spread": spread,
        "spread_of_counting": counting,
        "covered": fmean(_covers(row) for row in rows),
    }


def _variance(share: Share) -> float:
    # with one answer of each kind more, so that a share of one has some
    value = (share.right + 1) / (share.total + 2)
    return value * (1 - value) / share.total


def _covers(row: Compared) -> bool:
    """Whether the estimate's interval holds what fresh images gave (which is itself counted, so not 95% of them do)."""
    low, high = row.estimate.interval()
    return low <= row.truth.value <= high


def table(found: Mapping[tuple[int, str], Mapping[str, Any]]) -> str:
    lines = [
        "| shots | estimate | fresh images | bias | spread (by counting) | in interval |",
        "|---|---|---|---|---|---|",
    ]
    for (k, strategy), row in found.items():
        low, high = row["truth_interval"]
        lines.append(
            f"| {strategy}, k={k} | {row['estimate']:.3f} | {row['truth']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {row['bias']:+.3f} ± {row['bias_error']:.3f} | {row['spread']:.3f} ({row['spread_of_counting']:.3f}) "
            f"| {row['covered']:.2f} |"
        )
    return "\n".join(lines)


def measure(options: Options) -> dict[str, Any]:
    usable = categories(read_records(options.data), options.domain, options.examples + options.fresh)
    if len(usable) < options.ways:
        raise SystemExit(f"{len(usable)} categories have enough images, {options.ways} are needed")
    rows: list[Compared] = []
    followed: list[Followed] = []
    with Client(options.url, api_key=options.api_key) as client:
        for number in range(options.sets):
            began = time.monotonic()
            compared, one = compare(Server(options, client), draw(usable, options, number))
            rows += compared
            followed.append(one)
            print(f"set {number + 1} of {options.sets}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    found = {setting: summary(some) for setting, some in by_setting(rows)}
    gave, best = fmean(one.truth for one in followed), fmean(one.best for one in followed)
    print(table(found))
    print(f"\nfollowing the recommendation: {gave:.3f}, with {fmean(one.k for one in followed):.1f} shots; ", end="")
    print(f"the best setting of each set on these very images: {best:.3f}")
    settings = [{"strategy": strategy, "k": k, **row} for (k, strategy), row in found.items()]
    return {"sets": options.sets, "ways": options.ways, "settings": settings, "followed": gave, "best": best}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.leave_one_out", description=__doc__)
    parser.add_argument("url", help="of a server, as http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--data", type=Path, default=DATA, help=f"what training.default_data made (default: {DATA})")
    parser.add_argument("--domain", choices=("drawing", "photograph"), default="drawing")
    parser.add_argument("--sets", type=int, default=20)
    parser.add_argument("--ways", type=int, default=5, help="categories of a set")
    parser.add_argument("--examples", type=int, default=4, help="of each category in a set")
    parser.add_argument("--fresh", type=int, default=3, help="queries of each category that no set holds")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 5, 10, 15])
    parser.add_argument("--strategies", nargs="+", default=["random", "rices_image"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--calibration", choices=("none", "contextual"), default="none")
    parser.add_argument("--normalisation", choices=("sum", "mean"), default="sum")
    parser.add_argument("--permutations", type=int, default=1)
    print(json.dumps(measure(Options(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
