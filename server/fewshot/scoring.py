"""From log-probabilities of candidates to probabilities: length, contextual calibration, orders of the shots. Numpy alone.

Everything is added up in log space. An order of the shots has a bias of its own, so each is calibrated by the content-free
queries behind the same order, and orders are averaged after that (the paper's ensembling, with log-probabilities).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Normalisation = Literal["sum", "mean"]
Calibration = Literal["none", "contextual"]
# what a content-free query shows in place of its media
ContentFree = Literal["grey", "no_media", "both"]
Array = NDArray[np.float64]

# up to here all orders are listed and drawn from; beyond, a draw that repeats one is rare
MAX_LISTED_SHOTS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighing:
    """How scores become probabilities. `permutations`: orders of the shots, the given one among them."""

    normalisation: Normalisation = "sum"
    calibration: Calibration = "none"
    content_free: ContentFree = "grey"
    permutations: int = 1
    seed: int = 0


def scores(logprobs: Sequence[Sequence[float]], normalisation: Normalisation) -> Array:  # -> [candidates]
    """One number a candidate from its tokens' log-probabilities. A candidate has at least one token."""
    sums = np.array([math.fsum(tokens) for tokens in logprobs])
    return sums if normalisation == "sum" else sums / [len(tokens) for tokens in logprobs]


def log_softmax(values: Array) -> Array:
    """Over the last axis."""
    shifted = values - values.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def bias(content_free: Array) -> Array:  # [..., queries, candidates] -> [..., candidates]
    """Log of what the model answers to queries without content: the mean of their probabilities over the candidates
    (Zhao et al. 2021, "Calibrate Before Use")."""
    logs = log_softmax(content_free)
    result: Array = np.logaddexp.reduce(logs, axis=-2) - math.log(logs.shape[-2])
    return result


def probabilities(asked: Array, content_free: Array | None = None) -> Array:
    """Scores [orders, candidates], and of content-free queries [orders, queries, candidates] -> [candidates], sum 1.

    Dividing by the bias and making the sum one again is, in logs, to subtract it before the softmax.
    """
    logs = log_softmax(asked)
    if content_free is not None:
        logs = logs - bias(content_free)
    result: Array = np.exp(log_softmax(logs.mean(0)))
    return result


def ranking(values: Array) -> list[int]:
    """Places from the likeliest down; equal ones stay in the order that they were given."""
    return [int(place) for place in np.argsort(-values, kind="stable")]


def shot_orders(num_shots: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Distinct orders of the shots: as they stand, then drawn ones. Fewer than `count` where there are not so many."""
    rng = Random(seed)
    given = tuple(range(num_shots))
    if num_shots <= MAX_LISTED_SHOTS:
        others = list(permutations(given))[1:]
        return [given, *rng.sample(others, min(count - 1, len(others)))]
    orders = {given: None}
    while len(orders) < count:
        orders[tuple(rng.sample(given, num_shots))] = None
    return list(orders)
