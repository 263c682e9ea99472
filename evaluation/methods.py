"""Compare the methods of classification that a server offers, on categories that it has never seen.

`python -m evaluation.methods URL` sends episodes: labelled images of held-out categories under novel words as shots, and
one more image as the query. Each method answers each episode, after several numbers of shots per word. The table has the
accuracy of each method, and the accuracy of `auto` minus that of the best single method of the row, paired by episode. The
last line is JSON.
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
from statistics import fmean
from typing import get_args

from evaluation.counts import at_least
from evaluation.intervals import difference_to_best, share
from evaluation.leave_one_out import images_by_category
from evaluation.options import add_server_options, connected
from flamboyance_client import Client, example, query
from flamboyance_client.options import Method
from training.default.words import HELD_OUT_WORDS
from training.default_data.records import read_records

SEED = 31
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, slots=True)
class Episode:
    """Images with their words, round by round with every word once per round, and the query with the right word."""

    shots: list[tuple[str, str]]
    query: str
    answer: str


Answers = dict[Method, list[bool]]


def sample_episodes(categories: Mapping[str, list[str]], ways: int, rounds: int, count: int) -> Iterator[Episode]:
    for number in range(count):
        rng = Random(f"{SEED}/{ways}/{number}")
        names, words = rng.sample(sorted(categories), ways), rng.sample(HELD_OUT_WORDS, ways)
        images = [rng.sample(categories[name], rounds + 1) for name in names]
        shots = [(images[way][turn], words[way]) for turn in range(rounds) for way in rng.sample(range(ways), ways)]
        yield Episode(shots, images[number % ways][rounds], words[number % ways])


def answer(client: Client, data: Path, episode: Episode, num_shots: int, method: Method) -> bool:
    """Return whether a method answers the episode correctly after its first shots."""
    shots = [example(data / image, label=word) for image, word in episode.shots[:num_shots]]
    return client.classify(query(data / episode.query), shots=shots, method=method).label == episode.answer


def measure(
    client: Client, data: Path, episodes: Sequence[Episode], num_shots: int, methods: Sequence[Method], name: str
) -> Answers:
    answers: Answers = {method: [] for method in methods}
    started = time.monotonic()
    for number, episode in enumerate(episodes, 1):
        for method in methods:
            answers[method].append(answer(client, data, episode, num_shots, method))
        if number % 25 == 0:
            seconds = time.monotonic() - started
            print(f"{name}: {number} of {len(episodes)}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.methods", description=__doc__)
    add_server_options(parser)
    parser.add_argument("--domains", choices=("drawing", "photograph"), nargs="+", default=["drawing", "photograph"])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS, help="methods (default: all)")
    parser.add_argument("--episodes", type=at_least(1), default=200, help="episodes per row (default: 200)")
    parser.add_argument("--ways", type=at_least(2), default=5, help="words per episode (default: 5)")
    parser.add_argument("--rounds", type=at_least(1), nargs="+", default=[1, 2, 5], help="shots per word, a row each")
    options = parser.parse_args()
    records, results = read_records(options.data), {}
    methods = options.methods
    print(f"| | {' | '.join(methods)} | auto less the best |", "|---" * (len(methods) + 2) + "|", sep="\n", flush=True)
    with connected(options.url, options.api_key) as client:
        for domain in options.domains:
            categories = images_by_category(records, domain, max(options.rounds) + 1)
            episodes = list(sample_episodes(categories, options.ways, max(options.rounds), options.episodes))
            for rounds in options.rounds:
                name = f"{domain}s, {options.ways}-way, {rounds} per word"
                answers = measure(client, options.data, episodes, rounds * options.ways, methods, name)
                cells = [
                    *map(str, map(share, answers.values())),
                    difference_to_best(answers, "auto") if {"auto"} < answers.keys() else "",
                ]
                print(f"| {name} | {' | '.join(cells)} |", flush=True)
                results[name] = {method: fmean(correct) for method, correct in answers.items()}
    print(json.dumps({"episodes": options.episodes, "shares": results}))


if __name__ == "__main__":
    main()
