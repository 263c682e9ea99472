"""Find the best method by likeness for each number of examples per label, for the model's `methods.json`.

`python -m evaluation.prior` classifies images in process. The choice is made on images that `evaluation.default` does not
report: the simplest method whose mean over the domains is not clearly below that of the best. A first table has these
means. A second one, for held-out images, has the accuracy of each method, and the accuracy of `auto` with this choice minus
that of the best single method, paired by episode. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import get_args

import numpy as np

from evaluation.counts import at_least
from evaluation.held_out import Domain, Episode, Unreported, load_domains
from evaluation.intervals import Z
from evaluation.options import add_data_option
from model.prior import LikenessMethodName, Prior
from model.zoo.default import PRIOR_FILE, prepare
from server.fewshot.comparison import ComparedExamples
from server.fewshot.methods import load_method

METHODS: tuple[LikenessMethodName, ...] = get_args(LikenessMethodName)
AUTO = "auto"
CHOICE, REPORT = "choice", "report"  # the seeds

# a smaller gain, which differs between categories, is not worth a more complex method
MIN_GAIN = 0.005

Shares = dict[str, list[float]]


def answer(episode: Episode, method: str) -> float:
    """Return the share of queries that a method answers correctly."""
    logs = load_method(method).fit(episode.examples).log_probabilities(episode.queries.vectors)
    return float((logs.argmax(1) == episode.queries.labels).mean())


def measure(episodes: Sequence[Episode], prior: Prior | None = None) -> Shares:
    """Return the shares of the methods by episode and, with a prior, of `auto`."""
    shares: Shares = {method: [answer(episode, method) for episode in episodes] for method in METHODS}
    if prior is not None:
        chosen = [ComparedExamples(episode.examples, prior).choose_method() for episode in episodes]
        shares[AUTO] = [shares[method][number] for number, method in enumerate(chosen)]
    return shares


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference by episode, and half its 95% interval."""
    differences = np.subtract(first, second).tolist()
    return fmean(differences), Z * stdev(differences) / math.sqrt(len(differences))


def choose(by_domain: Sequence[Shares]) -> LikenessMethodName:
    """Return the simplest method whose mean over the domains is not clearly below that of the best one."""
    best = max(METHODS, key=lambda method: fmean(fmean(shares[method]) for shares in by_domain))

    def is_close(method: str) -> bool:
        pairs = [paired(shares[best], shares[method]) for shares in by_domain]
        half = math.sqrt(sum(half**2 for _, half in pairs)) / len(pairs)
        return fmean(mean for mean, _ in pairs) <= max(half, MIN_GAIN)

    return next(method for method in METHODS if is_close(method))


def find_prior(domains: Sequence[Domain], options: argparse.Namespace) -> Prior:
    """Choose a method for each number of examples, and print the means on which the choice is based."""
    print(f"| examples per label | {' | '.join(METHODS)} | chosen |", "|---" * (len(METHODS) + 2) + "|", sep="\n")
    methods: dict[int, LikenessMethodName] = {}
    for per_label in options.per_label:
        episodes = [_episodes(domain, CHOICE, per_label, options) for domain in domains]
        if measured := [measure(of_domain) for of_domain in episodes if of_domain]:
            best = choose(measured)
            means = [f"{fmean(fmean(shares[method]) for shares in measured):.3f}" for method in METHODS]
            print(f"| {per_label} | {' | '.join(means)} | {best} |", flush=True)
            if not methods or methods[max(methods)] != best:
                methods[per_label] = best
    return Prior(methods)


def _episodes(domain: Domain, seed: str, per_label: int, options: argparse.Namespace) -> list[Episode]:
    return list(domain.episodes(options.ways, per_label, options.episodes, f"prior {seed}"))


def _row(name: str, shares: Mapping[str, Sequence[float]]) -> str:
    best = max(METHODS, key=lambda method: fmean(shares[method]))
    mean, half = paired(shares[AUTO], shares[best])
    cells = [f"{fmean(values):.3f}" for values in shares.values()]
    return f"| {name} | {' | '.join(cells)} | {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] ({best}) |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.prior", description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder (default: the default model's)")
    add_data_option(parser)
    parser.add_argument("--episodes", type=at_least(2), default=400, help="episodes per row (default: 400)")
    parser.add_argument("--ways", type=at_least(2), default=5, help="labels per episode (default: 5)")
    parser.add_argument(
        "--per-label", type=at_least(1), nargs="+", default=[1, 2, 3, 5, 10, 20], help="examples, a row each"
    )
    parser.add_argument("--write", action="store_true", help=f"write {PRIOR_FILE.name} of the default model")
    options = parser.parse_args()
    model = options.model or prepare()
    prior = find_prior(Unreported.load(options.data, model).domains(), options)
    domains, results = load_domains(options.data, model), {}
    print(f"| | {' | '.join((*METHODS, AUTO))} | auto less the best |", "|---" * (len(METHODS) + 3) + "|", sep="\n")
    for domain in domains:
        for per_label in options.per_label:
            if episodes := _episodes(domain, REPORT, per_label, options):
                name = f"{domain.name}, {options.ways}-way, {per_label} per label"
                results[name] = measure(episodes, prior)
                print(_row(name, results[name]), flush=True)
    if options.write:
        PRIOR_FILE.write_text(prior.to_json(), encoding="utf-8")
    shares = {name: {method: fmean(values) for method, values in row.items()} for name, row in results.items()}
    print(json.dumps({"episodes": options.episodes, "methods": prior.methods, "shares": shares}))


if __name__ == "__main__":
    main()
