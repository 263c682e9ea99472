"""Turns log-probabilities of candidates into probabilities: length normalisation, contextual calibration, orders of shots.

All sums are computed in log space. Each order of the shots has a bias of its own, so its scores are calibrated by
content-free queries after the same order; orders are averaged afterwards (the paper's ensembling, in log-probabilities).
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
# the media of a content-free query
ContentFree = Literal["grey", "no_media", "both"]
Array = NDArray[np.float64]

# up to this number all orders are listed and drawn from; beyond it, a draw rarely repeats an order
MAX_LISTED_SHOTS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighing:
    """The settings that turn scores into probabilities; `permutations` counts orders of shots, the original included."""

    normalisation: Normalisation = "sum"
    calibration: Calibration = "none"
    content_free: ContentFree = "grey"
    permutations: int = 1
    seed: int = 0


def scores(logprobs: Sequence[Sequence[float]], normalisation: Normalisation) -> Array:  # -> [candidates]
    """Return one score per candidate from the log-probabilities of its tokens, of which it has at least one."""
    sums = np.array([math.fsum(tokens) for tokens in logprobs])
    return sums if normalisation == "sum" else sums / [len(tokens) for tokens in logprobs]


def log_softmax(values: Array) -> Array:
    """Return the logarithms of the softmax over the last axis."""
    shifted = values - values.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def bias(content_free: Array) -> Array:  # [..., queries, candidates] -> [..., candidates]
    """Return the log of the candidates' mean probability over content-free queries.

    The model would answer with these probabilities without any content (Zhao et al. 2021, "Calibrate Before Use").
    """
    logs = log_softmax(content_free)
    result: Array = np.logaddexp.reduce(logs, axis=-2) - math.log(logs.shape[-2])
    return result


def probabilities(query_scores: Array, content_free: Array | None = None) -> Array:
    """Return probabilities [candidates] that sum to 1.

    `query_scores`: [orders, candidates]; `content_free`: scores of content-free queries, [orders, queries, candidates].
    Dividing by the bias and normalising the sum to 1 is, in logs, subtracting the bias before the softmax.
    """
    logs = log_softmax(query_scores)
    if content_free is not None:
        logs = logs - bias(content_free)
    result: Array = np.exp(log_softmax(logs.mean(0)))
    return result


def ranking(values: Array) -> list[int]:
    """Return the indices of the values, highest first; equal values keep their order."""
    return [int(index) for index in np.argsort(-values, kind="stable")]


def shot_orders(num_shots: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Return `count` distinct orders of the shots, or all if fewer exist: the original order, then drawn ones."""
    rng = Random(seed)
    original = tuple(range(num_shots))
    if num_shots <= MAX_LISTED_SHOTS:
        permuted = list(permutations(original))[1:]
        return [original, *rng.sample(permuted, min(count - 1, len(permuted)))]
    orders = {original: None}
    while len(orders) < count:
        orders[tuple(rng.sample(original, num_shots))] = None
    return list(orders)
