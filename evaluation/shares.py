"""Find the shares of a likeness's parts, for `training.default.likeness`.

`python -m evaluation.shares` classifies images by the nearest mean: first with the shares of earlier likenesses, then with
every combination of shares. `evaluation.default` reports none of these images. The table has the accuracies of each domain,
by the number of examples per label. The best shares have the highest mean over the domains. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np

from evaluation.counts import at_least
from evaluation.held_out import Domain, Unreported
from evaluation.options import add_data_option
from evaluation.prior import answer
from model.likeness import FIRST_SHARES, ClassLikeness
from model.zoo.default import prepare

SEED = "shares"
# shares relative to that of the discriminants: of classes, and of ancestors of familiar and of strange images
CLASSES = (0.0875, 0.175, 0.35)
FAMILIAR = (0.0875, 0.175, 0.35)
STRANGE = (0.7, 1.4, 2.8)
# the shares of files without this tensor, for comparison
FIRST = FIRST_SHARES[1:]
METHOD = "nearest_mean"

Shares = tuple[float, ...]


def accuracies(domain: Domain, options: argparse.Namespace) -> list[float]:
    """Return the accuracy for each number of examples per label that the domain has."""
    by_number = [list(domain.episodes(options.ways, n, options.episodes, SEED)) for n in options.per_label]
    return [fmean(answer(episode, METHOD) for episode in episodes) for episodes in by_number if episodes]


def mean(by_domain: Mapping[str, Sequence[float]]) -> float:
    """Return the mean over the domains, which have equal weights, whatever their numbers of accuracies."""
    return fmean(fmean(values) for values in by_domain.values() if values)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.shares", description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder (default: the default model's)")
    add_data_option(parser)
    parser.add_argument("--episodes", type=at_least(1), default=300, help="episodes per accuracy (default: 300)")
    parser.add_argument("--ways", type=at_least(2), default=5, help="labels per episode (default: 5)")
    parser.add_argument("--per-label", type=at_least(1), nargs="+", default=[1, 2, 3, 4], help="examples per label")
    options = parser.parse_args()
    unreported, means = Unreported.load(options.data, options.model or prepare()), dict[Shares, float]()
    if not isinstance(unreported.likeness, ClassLikeness):
        parser.error("the model has no likeness with shares of its own")
    domains = " | ".join(unreported.categories)
    print(f"| classes, ancestors: familiar, strange | {domains} | mean |", "|---" * 5 + "|", sep="\n")
    for relative in (FIRST, *product(CLASSES, FAMILIAR, STRANGE)):
        shares = (1.0, *relative)
        likeness = replace(unreported.likeness, shares=np.array(shares, np.float32))
        by_domain = {d.name: accuracies(d, options) for d in replace(unreported, likeness=likeness).domains()}
        if not any(by_domain.values()):
            raise SystemExit(f"error: {options.data} has too few images for episodes of {options.ways} labels")
        cells = [", ".join(f"{value:.3f}" for value in by_domain.get(name, ())) for name in unreported.categories]
        means[shares] = mean(by_domain)
        print(f"| {', '.join(map(str, relative))} | {' | '.join(cells)} | {means[shares]:.4f} |", flush=True)
    best = max(means, key=means.__getitem__)
    print(json.dumps({"episodes": options.episodes, "per_label": options.per_label, "best": best, "mean": means[best]}))


if __name__ == "__main__":
    main()
