"""Measure how well a server's diagnostics find wrong labels, on photographs that were not used in training.

`python -m evaluation.diagnostics URL` creates support sets of five kinds of photographs, in which a tenth of the labels are
replaced by another label of the set, at random. The table has the recall and the precision of the diagnostics, and the
accuracy of the nearest mean on other photographs: with the wrong labels, without the reported examples, with the suggested
labels for these, and with the right labels. Intervals are over sets. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from random import Random

from evaluation.counts import at_least
from evaluation.intervals import Ratio
from evaluation.options import add_server_options, connected
from evaluation.photographs import Labelled, Photographs, uploaded
from flamboyance_client import Client, example

SEED = 37
WRONG = 0.1
COLUMNS = (
    "recall",
    "precision",
    "label",
    "harmful",
    "wrong labels",
    "named left out",
    "named corrected",
    "right labels",
)


@dataclass(frozen=True, slots=True)
class PlantedSet:
    """Images with their kinds, some of which have another label; and fresh images of the same kinds."""

    examples: list[tuple[str, str]]
    wrong: dict[str, str]
    fresh: list[tuple[str, str]]

    def labelled(self, replaced: Mapping[str, str], left_out: Collection[str] = ()) -> Labelled:
        """Return the examples with some labels replaced and some left out."""
        return [(image, replaced.get(image, kind)) for image, kind in self.examples if image not in left_out]


Fraction = tuple[float, float]


def plant(images: Mapping[str, list[str]], ways: int, per_label: int, num_fresh: int, number: int) -> PlantedSet:
    """Draw a set, and give a tenth of its examples another label of the set."""
    rng = Random(f"{SEED}/{ways}/{per_label}/{number}")
    kinds = rng.sample(sorted(kind for kind, ids in images.items() if len(ids) > per_label), ways)
    drawn = {kind: rng.sample(images[kind], len(images[kind]))[: per_label + num_fresh] for kind in kinds}
    examples = [(image, kind) for kind in kinds for image in drawn[kind][:per_label]]
    wrong = {
        image: rng.choice([other for other in kinds if other != kind])
        for image, kind in rng.sample(examples, round(WRONG * len(examples)))
    }
    rng.shuffle(examples)
    return PlantedSet(examples, wrong, [(image, kind) for kind in kinds for image in drawn[kind][per_label:]])


def judge(client: Client, photographs: Photographs, planted: PlantedSet) -> dict[str, Fraction]:
    """Return the numerator and the denominator of each column for one set."""
    examples = [example(image, label=label, id=image) for image, label in planted.labelled(planted.wrong)]
    support_set = client.support_sets.create(examples=examples, ttl_seconds=3600)
    try:
        diagnostics = client.support_sets.diagnostics(support_set.id, limit=1000)
    finally:
        client.support_sets.delete(support_set.id)
    named = {entry.id: entry.looks_like for entry in diagnostics.mislabelled}
    harmful = {entry.id for entry in diagnostics.harmful}
    kinds, hits = dict(planted.examples), named.keys() & planted.wrong.keys()
    return {
        "recall": (len(hits), len(planted.wrong)),
        "precision": (len(hits), len(named)),
        "label": (sum(named[image] == kinds[image] for image in hits), len(hits)),
        "harmful": (len(harmful & planted.wrong.keys()), len(harmful)),
        "wrong labels": photographs.accuracy(planted.labelled(planted.wrong), planted.fresh),
        "named left out": photographs.accuracy(planted.labelled(planted.wrong, named), planted.fresh),
        "named corrected": photographs.accuracy(planted.labelled({**planted.wrong, **named}), planted.fresh),
        "right labels": photographs.accuracy(planted.labelled({}), planted.fresh),
    }


def measure(client: Client, photographs: Photographs, options: argparse.Namespace, per_label: int) -> dict[str, Ratio]:
    outcomes: list[dict[str, Fraction]] = []
    for number in range(options.sets):
        planted = plant(photographs.by_kind, options.ways, per_label, options.fresh, number)
        outcomes.append(judge(client, photographs, planted))
        if (number + 1) % 10 == 0:
            print(f"{per_label} per label: {number + 1} of {options.sets} sets", file=sys.stderr, flush=True)
    return {column: Ratio([outcome[column] for outcome in outcomes]) for column in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.diagnostics", description=__doc__)
    add_server_options(parser)
    parser.add_argument("--sets", type=at_least(1), default=200, help="sets per row (default: 200)")
    parser.add_argument("--ways", type=at_least(2), default=5, help="labels per set (default: 5)")
    parser.add_argument(
        "--per-label", type=at_least(1), nargs="+", default=[10, 20], help="examples per label, a row each"
    )
    parser.add_argument(
        "--fresh", type=at_least(1), default=5, help="fresh images per label, if there are as many (default: 5)"
    )
    options = parser.parse_args()
    print(f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|", sep="\n", flush=True)
    results: dict[str, dict[str, float]] = {}
    with connected(options.url, options.api_key) as client, uploaded(client, options.data) as photographs:
        for per_label in options.per_label:
            row = measure(client, photographs, options, per_label)
            name = f"{options.ways}-way, {per_label} per label"
            print(f"| {name} | {' | '.join(str(row[column]) for column in COLUMNS)} |", flush=True)
            results[name] = {column: ratio.value for column, ratio in row.items()}
    print(json.dumps({"sets": options.sets, "wrong": WRONG, "rows": results}))


if __name__ == "__main__":
    main()
