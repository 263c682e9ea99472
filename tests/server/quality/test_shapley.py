"""Values of examples against their definition, summed over all subsets of the others."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from server.quality.shapley import NUM_NEIGHBOURS, shapley_values


def defined_values(labels: list[int], similarities: np.ndarray) -> np.ndarray:
    """Return the values by the definition: the mean gain by adding an example to each subset, sizes equally weighted."""
    number, values = len(labels), np.zeros(len(labels))
    for query in range(number):
        players = [index for index in range(number) if index != query]

        def right(subset: tuple[int, ...], query: int = query) -> float:
            nearest = sorted(subset, key=lambda index: -similarities[query, index])[:NUM_NEIGHBOURS]
            return sum(labels[index] == labels[query] for index in nearest) / NUM_NEIGHBOURS

        for player in players:
            rest = [index for index in players if index != player]
            for size in range(len(players)):
                gains = [right((*subset, player)) - right(subset) for subset in combinations(rest, size)]
                values[player] += sum(gains) / comb(len(rest), size) / len(players)
    return values


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
def test_values_are_those_of_the_definition(number: int) -> None:
    rng = np.random.default_rng(number)
    labels = rng.integers(0, 2, number)
    vectors = rng.standard_normal((number, 4)).astype(np.float32)
    similarities = vectors @ vectors.T
    expected = defined_values(labels.tolist(), similarities)
    assert shapley_values(labels, slice(0, number), similarities) == pytest.approx(expected, abs=1e-6)
    halves = [shapley_values(labels, rows, similarities[rows]) for rows in (slice(0, 1), slice(1, number))]
    assert sum(halves) == pytest.approx(expected, abs=1e-6)


def test_all_values_together_are_the_right_answers() -> None:
    rng = np.random.default_rng(0)
    labels, vectors = rng.integers(0, 3, 40), rng.standard_normal((40, 6)).astype(np.float32)
    similarities = vectors @ vectors.T
    masked = similarities - np.diag(np.full(40, np.inf))
    nearest = np.argsort(-masked, axis=1)[:, :NUM_NEIGHBOURS]
    right = (labels[nearest] == labels[:, None]).sum() / NUM_NEIGHBOURS
    assert shapley_values(labels, slice(0, 40), similarities).sum() == pytest.approx(right)
