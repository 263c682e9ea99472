"""Measure abstention: the accuracy of the labels that a server returns, and how often it returns one.

`python -m evaluation.abstention URL` creates support sets of held-out categories under words that the model has never seen,
and classifies fresh images of the same categories, with each `target_accuracy` and without one. A row has the accuracy of
the returned labels, and their share of all images. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, get_args

from evaluation.counts import at_least
from evaluation.intervals import Share, share
from evaluation.leave_one_out import ImageSplit, draw_split, images_by_category
from evaluation.options import add_server_options, connected
from flamboyance_client import Classification, Client, example
from flamboyance_client.options import Method
from training.default_data.records import Record, read_records

SEED = 37


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """Support sets of one size, to draw from a domain."""

    domain: str
    ways: int
    shots: int
    fresh: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.domain}s, {self.ways}-way, {self.shots} per word"

    def draw(self, records: list[Record], seed: int) -> Iterator[ImageSplit]:
        categories = images_by_category(records, self.domain, self.shots + self.fresh)
        for number in range(self.count):
            rng = Random(f"{seed}/{self.domain}/{self.ways}/{number}")
            yield draw_split(categories, rng, ways=self.ways, num_examples=self.shots, num_fresh=self.fresh)


@contextmanager
def stored(client: Client, data: Path, split: ImageSplit) -> Iterator[str]:
    """Store the examples as a support set, and delete it at the end."""
    examples = [example(data / image, label=word) for image, word in split.examples]
    support_set = client.support_sets.create(examples=examples, ttl_seconds=24 * 3600).id
    try:
        yield support_set
    finally:
        client.support_sets.delete(support_set)


def classify(
    client: Client, data: Path, split: ImageSplit, support_set: str, method: Method, target: float | None = None
) -> list[Classification]:
    """Classify the fresh images of a split."""
    images = [data / image for image, _ in split.fresh]
    return client.classify_many(images, examples=support_set, method=method, target_accuracy=target)


def measure(client: Client, options: argparse.Namespace, sets: Sets) -> dict[float | None, tuple[Share, float]]:
    """Return, for each target including None, the accuracy of the returned labels, and the coverage."""
    targets = [None, *options.targets]
    is_right: dict[float | None, list[bool | None]] = {target: [] for target in targets}
    started = time.monotonic()
    for number, split in enumerate(sets.draw(read_records(options.data), SEED), 1):
        with stored(client, options.data, split) as support_set:
            for target in targets:
                answers = classify(client, options.data, split, support_set, options.method, target)
                is_right[target] += [
                    None if answer.label is None else answer.label == word
                    for answer, (_, word) in zip(answers, split.fresh, strict=True)
                ]
        if number % 10 == 0:
            seconds = time.monotonic() - started
            print(f"{sets.name}: {number} of {sets.count}, {seconds:.0f} s", file=sys.stderr)
    labels = {target: [right for right in rights if right is not None] for target, rights in is_right.items()}
    return {target: (share(rights), len(rights) / len(is_right[target])) for target, rights in labels.items()}


def cell(accuracy: Share, coverage: float) -> str:
    return f"{accuracy if accuracy.num_answers else '-'}, {coverage:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.abstention", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--method", choices=get_args(Method), default="auto")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.9, 0.95], help="target accuracies")
    options = parser.parse_args()
    heads = ["labels given: accuracy, share", "all", *map(str, options.targets)]
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n", flush=True)
    results: dict[str, Any] = {}
    with connected(options.url, options.api_key) as client:
        for sets in all_sets(options):
            measured = measure(client, options, sets)
            print(f"| {sets.name} | {' | '.join(cell(*entry) for entry in measured.values())} |", flush=True)
            results[sets.name] = {
                str(target or "all"): {"labels": accuracy.num_answers, "right": accuracy.num_correct, "share": coverage}
                for target, (accuracy, coverage) in measured.items()
            }
    print(json.dumps({"method": options.method, "sets": options.sets, "results": results}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the server and for the size of the support sets."""
    add_server_options(parser)
    parser.add_argument("--domains", choices=("drawing", "photograph"), nargs="+", default=["drawing", "photograph"])
    parser.add_argument("--sets", type=at_least(1), default=100, help="support sets per row (default: 100)")
    parser.add_argument("--ways", type=at_least(2), default=5, help="words per set (default: 5)")
    parser.add_argument("--shots", type=at_least(1), nargs="+", default=[2, 5], help="examples per word, a row each")
    parser.add_argument("--fresh", type=at_least(1), default=1, help="fresh images per word (default: 1)")


def all_sets(options: argparse.Namespace) -> Iterator[Sets]:
    for domain in options.domains:
        for shots in options.shots:
            yield Sets(domain=domain, ways=options.ways, shots=shots, fresh=options.fresh, count=options.sets)


if __name__ == "__main__":
    main()
