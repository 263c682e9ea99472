"""Compare leave-one-out estimates of support sets with the accuracy on fresh images, for the methods by likeness.

`python -m evaluation.estimates` creates support sets of held-out images in process, and estimates the accuracy of each as
an evaluation on a server does. A table has, for each method and number of examples, the bias of the estimate (its mean
difference from the accuracy on fresh images), and the coverage of its 95% interval. The last line is JSON. For methods with
a prompt, see `evaluation.leave_one_out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.bias import Comparison, format_table, summarise
from evaluation.counts import at_least
from evaluation.held_out import Domain, Episode, load_domains
from evaluation.intervals import Share
from evaluation.options import add_data_option
from model.zoo.default import prepare
from server.fewshot.methods import METHODS, load_method
from server.fewshot.methods.likeness import left_out_log_probabilities
from server.quality.measures import Predictions

SEED = "estimates"
# minimum of fresh images per label: with fewer, the accuracy of a set is too uncertain
MIN_FRESH = 2


def compare(episode: Episode, method: str) -> Comparison:
    """Compare the estimate of a method on the examples of an episode with its accuracy on the queries."""
    logs = left_out_log_probabilities(load_method(method), episode.examples)
    summary = Predictions(np.exp(logs), episode.examples.labels).summary([""] * episode.examples.num_labels)
    fresh = load_method(method).fit(episode.examples).log_probabilities(episode.queries.vectors).argmax(1)
    low, high = summary["accuracy_interval"]
    truth = Share(int((fresh == episode.queries.labels).sum()), len(fresh))
    return Comparison(method, None, Share(summary["correct"], summary["queries"]), (low, high), truth)


def measure(domain: Domain, per_label: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the summary of each method by the name of its row; none if the domain has too few images."""
    episodes = list(domain.episodes(options.ways, per_label, options.sets, SEED, min_queries=MIN_FRESH))
    methods = METHODS if episodes else ()
    return {
        f"{domain.name}, {per_label} per label, {method}": summarise([compare(episode, method) for episode in episodes])
        for method in methods
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.estimates", description=__doc__)
    parser.add_argument("--model", type=Path, help="a model folder (default: the default model's)")
    add_data_option(parser)
    parser.add_argument("--sets", type=at_least(1), default=100, help="support sets per row (default: 100)")
    parser.add_argument("--ways", type=at_least(2), default=5, help="labels per set (default: 5)")
    parser.add_argument(
        "--per-label", type=at_least(1), nargs="+", default=[2, 3, 4, 5, 8], help="examples, a row each"
    )
    options = parser.parse_args()
    summaries: dict[str, dict[str, Any]] = {}
    for domain in load_domains(options.data, options.model or prepare()):
        for per_label in options.per_label:
            summaries |= measure(domain, per_label, options)
    print(format_table(summaries))
    print(json.dumps({"ways": options.ways, "settings": [{"setting": name, **row} for name, row in summaries.items()]}))


if __name__ == "__main__":
    main()
