"""Suggests images of a pool to label next: those that cover most of what the labelled examples leave uncertain.

The rule is facility location weighted by uncertainty (Wei, Iyer and Bilmes, 2015, "Submodularity in data subset selection
and active learning"). An image of the pool is covered as far as it is similar to a labelled example or to a suggested
image. The next suggestion is the image that adds most to what is covered. An image counts the more, the less certain
its label is. So suggestions are typical of the uncertain part of the pool, and unlike each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.likeness import Vectors
from server.fewshot.methods.likeness import Array
from server.quality.left_out import blocks
from server.schemas.responses.curation import LabelProbability

# the weight of an image whose label is certain; one between two labels has weight 1. On photographs, 0.5 to 1 did as well
CERTAIN = 0.75
NUM_LABELS = 2


@dataclass(frozen=True, slots=True)
class Suggestion:
    """An image to label, by its index in the pool, and the reasons.

    `margin` is by how much its first label is more probable than the second, `similarity` is that to the most similar
    labelled example or earlier suggestion, and `gain` is the weighted part of the pool that it covers in addition.
    """

    index: int
    gain: float
    similarity: float | None
    margin: float | None
    labels: list[LabelProbability]


def suggest(
    pool: Vectors, labelled: Vectors, probabilities: Array | None, names: Sequence[str], count: int
) -> list[Suggestion]:
    """Return up to `count` images in the order in which to label them.

    `pool` [P, D] and `labelled` [N, D] are vectors of length one. `probabilities` [P, C] are those of the labels `names`;
    None if there are no two labels.
    """
    margins = None if probabilities is None else label_margins(probabilities)
    weights = np.ones(len(pool)) if margins is None else 1 - (1 - CERTAIN) * margins
    similarities = pool @ pool.T
    nearest = nearest_similarities(pool, labelled)
    is_open = np.ones(len(pool), bool)
    suggestions: list[Suggestion] = []
    for _ in range(min(count, len(pool))):
        gains = weights @ np.maximum(similarities - np.maximum(nearest, 0)[:, None], 0) / weights.sum()
        index = int(np.where(is_open, gains, -1).argmax())
        suggestion = Suggestion(
            index=index,
            gain=float(gains[index]),
            similarity=float(nearest[index]) if np.isfinite(nearest[index]) else None,
            margin=None if margins is None else float(margins[index]),
            labels=[] if probabilities is None else _labels(probabilities[index], names),
        )
        suggestions.append(suggestion)
        is_open[index] = False
        nearest = np.maximum(nearest, similarities[index])
    return suggestions


def nearest_similarities(pool: Vectors, labelled: Vectors) -> Array:
    """Return the similarity [P] of each image to the most similar labelled one: minus infinity if there is none."""
    nearest = np.full(len(pool), -np.inf)
    for rows in blocks(len(labelled), len(pool)):
        nearest = np.maximum(nearest, (pool @ labelled[rows].T).max(1))
    return nearest


def label_margins(probabilities: Array) -> Array:
    """Return by how much the most probable of at least two labels [P, C] is more probable than the second: [P]."""
    best = np.partition(probabilities, -NUM_LABELS)[:, -NUM_LABELS:]
    margins: Array = best[:, 1] - best[:, 0]
    return margins


def _labels(probabilities: Array, names: Sequence[str]) -> list[LabelProbability]:
    best = np.argsort(-probabilities, kind="stable")[:NUM_LABELS]
    return [LabelProbability(names[label], float(probabilities[label])) for label in best]
