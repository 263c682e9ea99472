"""Measure whether labelling the images that a server suggests helps more than random ones, on unseen photographs.

`python -m evaluation.suggestions URL` creates support sets of five kinds of photographs with few examples per label, and a
pool of others. It adds suggested images with their labels, or the same number of random ones, and classifies fresh images.
The table has the accuracy before, with random and with suggested images, and the difference of these two, paired by set.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean, stdev

from evaluation.counts import at_least
from evaluation.intervals import Z
from evaluation.options import add_server_options, connected
from evaluation.photographs import Labelled, Photographs, uploaded
from flamboyance_client import Client, example

SEED = 41
NUM_DRAWS = 10


@dataclass(frozen=True, slots=True)
class Episode:
    """Images with their kinds: the first examples, a pool whose kinds are not known yet, and fresh images."""

    examples: list[tuple[str, str]]
    pool: list[tuple[str, str]]
    fresh: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The accuracy on fresh images with the first examples, with random images in addition, and with suggested ones."""

    before: float
    random: float
    suggested: float


def sample_episode(
    images: Mapping[str, list[str]], options: argparse.Namespace, per_label: int, number: int
) -> Episode:
    rng = Random(f"{SEED}/{options.ways}/{per_label}/{number}")
    episode = Episode([], [], [])
    for kind in rng.sample(sorted(images), options.ways):
        drawn = [(image, kind) for image in rng.sample(images[kind], len(images[kind]))]
        episode.examples.extend(drawn[:per_label])
        episode.fresh.extend(drawn[per_label : per_label + options.fresh])
        episode.pool.extend(drawn[per_label + options.fresh :])
    pool = rng.sample(episode.pool, min(options.pool, len(episode.pool)))
    return Episode(episode.examples, pool, episode.fresh)


def suggested(client: Client, episode: Episode, count: int) -> Labelled:
    """Return the images of the pool that the server suggests."""
    examples = [example(image, label=kind) for image, kind in episode.examples]
    support_set = client.support_sets.create(examples=examples, ttl_seconds=3600)
    try:
        suggestions = client.support_sets.suggest(support_set.id, [image for image, _ in episode.pool], count=count)
    finally:
        client.support_sets.delete(support_set.id)
    return [episode.pool[suggestion.index] for suggestion in suggestions]


def judge(client: Client, photographs: Photographs, episode: Episode, count: int, number: int) -> Outcome:
    rng = Random(f"{SEED}/draws/{number}")
    draws = [rng.sample(episode.pool, count) for _ in range(NUM_DRAWS)]

    def accuracy(added: Labelled) -> float:
        num_right, total = photographs.accuracy([*episode.examples, *added], episode.fresh)
        return num_right / total

    return Outcome(
        before=accuracy([]),
        random=fmean(map(accuracy, draws)),
        suggested=accuracy(suggested(client, episode, count)),
    )


def mean_with_interval(values: Sequence[float]) -> str:
    half = Z * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):.3f} [{fmean(values) - half:.3f}, {fmean(values) + half:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.suggestions", description=__doc__)
    add_server_options(parser)
    parser.add_argument("--sets", type=at_least(1), default=200, help="sets per row (default: 200)")
    parser.add_argument("--ways", type=at_least(2), default=5, help="labels per set (default: 5)")
    parser.add_argument("--per-label", type=at_least(1), nargs="+", default=[1, 2], help="first examples per label")
    parser.add_argument("--counts", type=at_least(1), nargs="+", default=[5, 10], help="images to label")
    parser.add_argument("--pool", type=at_least(1), default=50, help="images in the pool, at most (default: 50)")
    parser.add_argument("--fresh", type=at_least(1), default=8, help="fresh images per label (default: 8)")
    options = parser.parse_args()
    columns, results = ("before", "random", "suggested", "suggested less random"), {}
    print(f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", sep="\n", flush=True)
    with connected(options.url, options.api_key) as client, uploaded(client, options.data) as photographs:
        for per_label in options.per_label:
            episodes = [
                sample_episode(photographs.by_kind, options, per_label, number) for number in range(options.sets)
            ]
            for count in options.counts:
                name = f"{options.ways}-way, {per_label} per label and {count} more"
                outcomes = [
                    judge(client, photographs, episode, count, number) for number, episode in enumerate(episodes)
                ]
                differences = [outcome.suggested - outcome.random for outcome in outcomes]
                lists = [[getattr(outcome, column) for outcome in outcomes] for column in columns[:3]]
                cells = [mean_with_interval(values) for values in (*lists, differences)]
                print(f"| {name} | {' | '.join(cells)} |", flush=True)
                results[name] = dict(zip(columns, map(fmean, (*lists, differences)), strict=True))
    print(json.dumps({"sets": options.sets, "rows": results}))


if __name__ == "__main__":
    main()
