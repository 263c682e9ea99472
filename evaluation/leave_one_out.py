"""Compare support sets' leave-one-out estimates, computed by a server, with their accuracy on fresh images.

`python -m evaluation.leave_one_out URL` creates support sets of held-out categories under words that the model has never
seen, and has the server evaluate them. It then classifies fresh images of the same categories with the same `examples` and
`method`. A table compares estimate and accuracy for each method, strategy and k over all sets; below it is the accuracy of
the settings that evaluations recommend, and of the method `auto`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Literal

from evaluation.bias import Comparison, format_table, summarise
from evaluation.counts import at_least
from evaluation.intervals import Share
from evaluation.options import add_server_options, connected
from flamboyance_client import Client, Evaluation, Selection, example, query
from flamboyance_client.options import Method, ProbabilityOptions
from training.default.words import HELD_OUT_WORDS
from training.default_data.records import Record, read_records
from training.default_data.split import is_held_out

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
    methods: list[str]
    k: list[int]
    strategies: list[str]
    seeds: list[int]
    calibration: Literal["none", "contextual"]
    normalisation: Literal["sum", "mean"]
    permutations: int

    @property
    def weighing(self) -> ProbabilityOptions:
        return {
            "calibration": self.calibration,
            "normalisation": self.normalisation,
            "permutations": self.permutations,
        }


@dataclass(frozen=True, slots=True)
class ImageSplit:
    """Images with the word for their category, divided into a support set's examples and fresh images."""

    examples: list[tuple[str, str]]
    fresh: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class FollowedRecommendation:
    """The accuracy on fresh images of the recommended setting, if there is one, of the best one, and of `auto`."""

    truth: float | None
    best: float
    auto: float
    method: str


def images_by_category(records: Sequence[Record], domain: str, min_images: int) -> dict[str, list[str]]:
    """Group held-out drawings by label or photographs by category, with at least `min_images` per group."""
    groups: dict[str, list[str]] = {}
    for record in records:
        if domain == "photograph" and record.domain == domain and record.category:
            groups.setdefault(record.category, []).append(record.image)
        elif domain == "drawing" and record.trains and record.label and is_held_out(record.label):
            groups.setdefault(record.label, []).append(record.image)
    return {name: images for name, images in sorted(groups.items()) if len(images) >= min_images}


def draw_split(
    categories: Mapping[str, list[str]], rng: Random, *, ways: int, num_examples: int, num_fresh: int
) -> ImageSplit:
    names, words = rng.sample(sorted(categories), ways), rng.sample(HELD_OUT_WORDS, ways)
    split = ImageSplit([], [])
    for name, word in zip(names, words, strict=True):
        images = [(image, word) for image in rng.sample(categories[name], num_examples + num_fresh)]
        split.examples.extend(images[:num_examples])
        split.fresh.extend(images[num_examples:])
    rng.shuffle(split.examples)
    return split


class Server:
    """The requests to the server with the command's options."""

    def __init__(self, options: Options, client: Client) -> None:
        self._options = options
        self._client = client

    def create(self, split: ImageSplit) -> str:
        examples = [example(self._options.data / image, label=word) for image, word in split.examples]
        return self._client.support_sets.create(examples=examples, ttl_seconds=24 * 3600).id

    def evaluate(self, support_set: str) -> Evaluation:
        """Evaluate a support set and wait for the result.

        Raises RuntimeError if the evaluation does not complete.
        """
        options = self._options
        evaluation = self._client.support_sets.evaluate(
            support_set,
            methods=options.methods,
            k=options.k,
            strategies=options.strategies,
            seeds=options.seeds,
            **options.weighing,
        )
        while not evaluation.is_over:
            time.sleep(POLL_SECONDS)
            evaluation = self._client.evaluations.get(evaluation.id)
        if evaluation.status != "completed":
            raise RuntimeError(f"evaluation {evaluation.id} is {evaluation.status}: {evaluation.raw['error']}")
        return evaluation

    def num_correct(self, selection: Selection, method: Method, images: Sequence[tuple[str, str]]) -> int:
        """Classify images, and return how many labels are right. Methods without a prompt have no weighing options."""
        weighing: ProbabilityOptions = self._options.weighing if "k" in selection else {}
        queries = [query(self._options.data / image) for image, _ in images]
        answers = [self._client.classify(q, examples=selection, method=method, **weighing).label for q in queries]
        return sum(answer == word for answer, (_, word) in zip(answers, images, strict=True))

    def delete(self, support_set: str) -> None:
        self._client.support_sets.delete(support_set)


def compare(server: Server, split: ImageSplit) -> tuple[list[Comparison], FollowedRecommendation]:
    """Compare all settings on one support set, and delete the set from the server."""
    support_set = server.create(split)
    try:
        evaluation = server.evaluate(support_set)
        rows = [_compare_cell(server, evaluation, cell, split) for cell in evaluation.cells]
        auto = server.num_correct({"support_set": support_set}, "auto", split.fresh) / len(split.fresh)
    finally:
        server.delete(support_set)
    recommended = evaluation.raw["recommendation"]
    by_setting = {_setting(cell): row for cell, row in zip(evaluation.cells, rows, strict=True)}
    best = max(row.truth.value for row in rows)
    if recommended is None:
        return rows, FollowedRecommendation(None, best, auto, "nothing")
    request = recommended["request"]
    followed = by_setting[_setting({**request["examples"], "method": request["method"]})]
    return rows, FollowedRecommendation(followed.truth.value, best, auto, request["method"])


def _setting(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(fields.get(name) for name in ("method", "strategy", "k", "seed"))


def _compare_cell(server: Server, evaluation: Evaluation, cell: Mapping[str, Any], split: ImageSplit) -> Comparison:
    selection: Selection = {"support_set": evaluation.raw["support_set"], "version": evaluation.raw["version"]}
    name = cell["method"]
    if cell["k"] is not None:
        selection |= {"k": cell["k"], "strategy": cell["strategy"], "seed": cell["seed"]}
        name = f"{cell['method']}, {cell['strategy']}"
    num_correct = server.num_correct(selection, cell["method"], split.fresh)
    estimate, truth = Share(cell["correct"], cell["queries"]), Share(num_correct, len(split.fresh))
    low, high = cell["accuracy_interval"]
    return Comparison(name, cell["k"], estimate, (low, high), truth)


def group_by_setting(rows: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """Return the rows by the name of their setting, those without a prompt first, then by the number of shots."""
    groups: dict[str, list[Comparison]] = {}
    for row in sorted(rows, key=lambda row: (-1 if row.k is None else row.k, row.name)):
        groups.setdefault(row.name if row.k is None else f"{row.name}, k={row.k}", []).append(row)
    return groups


def measure(options: Options) -> dict[str, Any]:
    categories = images_by_category(read_records(options.data), options.domain, options.examples + options.fresh)
    if len(categories) < options.ways:
        raise SystemExit(f"error: {len(categories)} categories have enough images, --ways needs {options.ways}")
    rows: list[Comparison] = []
    recommendations: list[FollowedRecommendation] = []
    with connected(options.url, options.api_key) as client:
        for number in range(options.sets):
            started, rng = time.monotonic(), Random(f"{SEED}/{options.domain}/{options.ways}/{number}")
            split = draw_split(
                categories, rng, ways=options.ways, num_examples=options.examples, num_fresh=options.fresh
            )
            comparisons, recommendation = compare(Server(options, client), split)
            rows += comparisons
            recommendations.append(recommendation)
            print(f"set {number + 1} of {options.sets}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    summaries = {name: summarise(comparisons) for name, comparisons in group_by_setting(rows).items()}
    means = {name: fmean(getattr(r, name) for r in recommendations) for name in ("auto", "best")}
    followed = [r.truth for r in recommendations if r.truth is not None]
    truth = fmean(followed) if followed else None
    methods = Counter(r.method for r in recommendations)
    print(format_table(summaries))
    print(
        f"\nfresh images: as recommended {truth and f'{truth:.3f}'} ({dict(methods)}), by the method auto "
        f"{means['auto']:.3f}; the best setting of each set on the same images: {means['best']:.3f}"
    )
    settings = [{"setting": name, **row} for name, row in summaries.items()]
    return {"sets": options.sets, "ways": options.ways, "settings": settings, "followed": truth, **means}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.leave_one_out", description=__doc__)
    add_server_options(parser)
    parser.add_argument("--domain", choices=("drawing", "photograph"), default="drawing")
    parser.add_argument("--sets", type=at_least(1), default=20, help="the number of support sets (default: 20)")
    parser.add_argument("--ways", type=at_least(2), default=5, help="categories per set (default: 5)")
    parser.add_argument("--examples", type=at_least(1), default=4, help="examples per category in a set (default: 4)")
    parser.add_argument("--fresh", type=at_least(1), default=3, help="fresh images per category (default: 3)")
    parser.add_argument("--methods", nargs="+", default=[], help="methods of classification (default: all)")
    parser.add_argument("--k", type=at_least(1), nargs="+", default=[2, 5, 10, 15], help="numbers of shots")
    parser.add_argument("--strategies", nargs="+", default=["random", "rices_image"], help="selection strategies")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the selection")
    parser.add_argument("--calibration", choices=("none", "contextual"), default="none")
    parser.add_argument("--normalisation", choices=("sum", "mean"), default="sum")
    parser.add_argument(
        "--permutations", type=at_least(1), default=1, help="orders of the shots to average (default: 1)"
    )
    print(json.dumps(measure(Options(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
