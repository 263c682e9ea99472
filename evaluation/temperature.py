"""Fit the temperatures that methods of classification have where an example set is too small to fit its own.

`python -m evaluation.temperature URL` classifies fresh images as `evaluation.abstention` does, on other support sets, and
finds for each method the temperature with the least surprise: the mean of the negative log-probability of the right label,
in nats. The last row of a method is of all images; `server/fewshot/confidence.py` has its temperature as the default. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from evaluation.abstention import Sets, add_arguments, all_sets, classify, stored
from evaluation.options import connected
from flamboyance_client import Classification, Client
from flamboyance_client.options import Method
from training.default_data.records import read_records

Array = NDArray[np.float64]

SEED = 41
TEMPERATURES = np.geomspace(0.05, 50, 400)
METHODS: tuple[Method, ...] = ("nearest_mean", "knn", "linear")


def margins(answer: Classification, label: str) -> list[float]:
    """Return the log-probabilities of all candidates, each the sum of its parts, minus that of the right one."""
    logs = {candidate.label: sum(candidate.scores.values()) for candidate in answer.candidates}
    return [value - logs[label] for value in logs.values()]


def surprises(rows: Sequence[Sequence[float]]) -> Array:
    """Return the mean surprise at each of the temperatures."""
    values = np.array(rows)  # [N, C]
    return np.array([np.logaddexp.reduce(values / temperature, axis=1).mean() for temperature in TEMPERATURES])


def best(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the temperature with the least surprise, and this surprise."""
    values = surprises(rows)
    return float(TEMPERATURES[values.argmin()]), float(values.min())


def measure(
    client: Client, options: argparse.Namespace, sets: Sets, methods: Sequence[Method]
) -> dict[Method, list[list[float]]]:
    """Return the margins of the fresh images' candidates by each method."""
    rows: dict[Method, list[list[float]]] = {method: [] for method in methods}
    for split in sets.draw(read_records(options.data), SEED):
        with stored(client, options.data, split) as support_set:
            for method in methods:
                answers = classify(client, options.data, split, support_set, method)
                rows[method] += [margins(a, word) for a, (_, word) in zip(answers, split.fresh, strict=True)]
    return rows


def print_rows(method: Method, by_row: Mapping[str, list[list[float]]]) -> float:
    """Print the rows of a method, and return the temperature of all its images."""
    rows = [row for images in by_row.values() for row in images]
    common, least = best(rows)
    index = int(np.abs(TEMPERATURES - common).argmin())
    for name, images in by_row.items():
        temperature, surprise = best(images)
        print(f"| {method} | {name} | {temperature:.2f} | {surprise:.3f} | {surprises(images)[index]:.3f} |")
    print(f"| {method} | all | {common:.2f} | {least:.3f} | {least:.3f} |", flush=True)
    return common


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.temperature", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--methods", choices=get_args(Method), nargs="+", default=METHODS)
    options = parser.parse_args()
    with connected(options.url, options.api_key) as client:
        measured = {sets.name: measure(client, options, sets, options.methods) for sets in all_sets(options)}
    print("| method | images | temperature | surprise | at the common temperature |", "|---" * 5 + "|", sep="\n")
    common = {
        method: print_rows(method, {name: rows[method] for name, rows in measured.items()})
        for method in options.methods
    }
    print(json.dumps({"sets": options.sets, "temperatures": common}))


if __name__ == "__main__":
    main()
