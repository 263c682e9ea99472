"""The worth of each example for the others: its Shapley value in the right answers of the nearest neighbours.

Each example is answered by the `NUM_NEIGHBOURS` most similar others, and is right as far as these have its label. An
example's value is its mean contribution over all orders in which the others may be added, exact and by sorting (Jia et al.,
2019, "Efficient task-specific data valuation for nearest neighbor algorithms"). A negative one makes others wrong.
"""

from __future__ import annotations

import numpy as np

from model.likeness import Vectors
from server.fewshot.methods.likeness import Array
from server.quality.left_out import Indices

# more neighbours find fewer of the wrong labels in small sets
NUM_NEIGHBOURS = 3


def shapley_values(labels: Indices, rows: slice, similarities: Vectors) -> Array:
    """Return the values [N] of all examples for the answers to the examples `rows`, by similarities [R, N]."""
    number = len(labels) - 1
    distances = -similarities
    distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, :number]
    is_right = (labels[order] == labels[rows, None]).astype(np.float64)
    ranks = np.arange(1, number + 1)
    weights = np.minimum(NUM_NEIGHBOURS, ranks) / (NUM_NEIGHBOURS * ranks)
    # from the least similar to the most similar: each value follows from that of the next one
    steps = (is_right - np.pad(is_right[:, 1:], ((0, 0), (0, min(number, 1))))) * weights
    values = np.cumsum(steps[:, ::-1], axis=1)[:, ::-1]
    return np.bincount(order.ravel(), values.ravel(), len(labels)).astype(np.float64)
