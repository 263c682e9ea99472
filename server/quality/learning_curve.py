"""The learning curve of a method by likeness: its accuracy in leave-one-out with fewer examples per label.

The last doubling of the examples says whether more of them will help.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.fewshot.methods.likeness import CHOICE_FOLDS, KEPT, Array, Labelled, LikenessMethod, folds, occurrences
from server.quality.measures import Z

Curve = list[dict[str, Any]]

# subsets of the examples that are drawn for a point, except for the last one, which has all
NUM_DRAWS = 5
# larger sets have no curve: it would take long, and they are rarely too small
MAX_EXAMPLES = 512
# a gain below this is too small for more examples
SMALL_GAIN = 0.02


def learning_curve(method: LikenessMethod, labelled: Labelled) -> Curve:
    """Return a point per number of examples per label, each about half of the next. Some label has at least two.

    A label that has fewer examples is there with all of them, and its only example is no query. `gain` is the difference to
    the point before, on the same queries, with its standard error.
    """
    fold_of, compact = folds(labelled.labels, CHOICE_FOLDS), labelled.compact()
    left_out = np.bincount(labelled.labels[fold_of == 0], minlength=labelled.num_labels)
    sizes = _sizes(max(int((labelled.counts() - left_out).max()), 1))
    points, before = Curve(), None
    for size in sizes:
        shares = _shares(method, compact, fold_of, size, num_draws=1 if size == sizes[-1] else NUM_DRAWS)
        gain = None if before is None else _mean_with_error(shares - before)
        points.append({"examples_per_label": size, "accuracy": float(shares.mean()), "gain": gain})
        before = shares
    return points


def _sizes(largest: int) -> list[int]:
    sizes = [largest]
    while sizes[0] > 1:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def _shares(method: LikenessMethod, labelled: Labelled, fold_of: NDArray[np.int64], size: int, num_draws: int) -> Array:
    """Return the share of draws in which each query [Q] is classified correctly by `size` others of each label."""
    shares = np.zeros(len(labelled.labels))
    rng = np.random.default_rng(size)
    for fold in np.unique(fold_of[fold_of != KEPT]):
        queries = fold_of == fold
        for _ in range(num_draws):
            fitted = method.fit(_subset(labelled.without(queries), size, rng))
            answers = fitted.log_probabilities(labelled.vectors[queries]).argmax(1)
            shares[queries] += (answers == labelled.labels[queries]) / num_draws
    return shares[fold_of != KEPT]


def _subset(labelled: Labelled, size: int, rng: np.random.Generator) -> Labelled:
    """Return up to `size` random examples of each label."""
    order = rng.permutation(len(labelled.labels))
    kept = np.sort(order[occurrences(labelled.labels[order]) < size])
    return Labelled(labelled.vectors[kept], labelled.labels[kept], labelled.num_labels)


def _mean_with_error(differences: Array) -> dict[str, float]:
    # a gain and a loss are added, so that no difference at all has some variance
    error = np.std([*differences, 1.0, -1.0], ddof=1) / math.sqrt(len(differences))
    return {"mean": float(differences.mean()), "standard_error": float(error)}


def report_curve(cells: Sequence[Mapping[str, Any]], recommended: str | None) -> dict[str, Any] | None:
    """Return the curve of the recommended method or, without one, of the most accurate method that has a curve."""
    with_curve = [cell for cell in cells if cell.get("learning_curve")]
    if not with_curve:
        return None
    cell = max(with_curve, key=lambda cell: (cell["method"] == recommended, cell["accuracy"]))
    points = cell["learning_curve"]
    return {"method": cell["method"], "points": points, "outlook": outlook(cell["method"], points)}


def outlook(method: str, points: Sequence[Mapping[str, Any]]) -> str | None:
    """Return whether more examples will help, in words; None for a curve of one point."""
    if len(points) < 2:
        return None
    before, last = points[-2:]
    gain, error = last["gain"]["mean"], last["gain"]["standard_error"]
    if gain > Z * error:
        verdict = "More examples will probably help"
    elif gain + Z * error < SMALL_GAIN:
        verdict = "More examples of the same kind will hardly help"
    else:
        verdict = "It is not known whether more examples will help"
    return (
        f"{verdict}: from {before['examples_per_label']} to {last['examples_per_label']} examples per label, {method} went "
        f"from {before['accuracy']:.3f} to {last['accuracy']:.3f} ({gain:+z.3f} ± {error:.3f})."
    )
