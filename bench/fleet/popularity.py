"""The popularity of support sets: Zipf's law, and the hit rate that an LRU cache has under it by Che's approximation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BISECTIONS = 200


def zipf(num_sets: int, exponent: float) -> Floats:
    """Return the probability of each support set, the most popular one first."""
    weights = np.arange(1, num_sets + 1, dtype=float) ** -exponent
    return np.asarray(weights / weights.sum())


def draw(probabilities: Floats, count: int, rng: np.random.Generator) -> NDArray[Any]:
    """Return independently drawn support sets, by their rank."""
    bounds = np.cumsum(probabilities)
    return np.searchsorted(bounds, rng.random(count) * bounds[-1], side="right")


def che_hit_rate(probabilities: Floats, capacity: float, size: float = 1.0, new_size: float = 0.0) -> float:
    """Return the hit rate of an LRU cache under independent references (Che, Tung and Wang 2002).

    Each support set takes `size` of the capacity, and each request adds `new_size` that is never used again.
    """
    hits = -np.expm1(-probabilities * _characteristic_time(probabilities, capacity, size, new_size))
    return float(probabilities @ hits)


def _characteristic_time(probabilities: Floats, capacity: float, size: float, new_size: float) -> float:
    """Return after how many requests an entry that is not used again leaves the cache."""

    def used(time: float) -> float:
        return float(size * -np.expm1(-probabilities * time).sum() + new_size * time)

    low, high = 0.0, 1.0
    while used(high) < capacity:
        low, high = high, 2 * high
        if high > 1e18:  # everything fits
            return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if used(middle) < capacity else (low, middle)
    return high
