"""The arithmetic of leave-one-out evaluation of a support set: its cells, their results, and the recommended setting.

A cell is a strategy, a number of shots and a seed. In a cell each example is the query once, and its shots are selected
from the other examples, as for a request. This estimates the accuracy of a set without any other labelled data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from random import Random
from statistics import fmean
from typing import Any

import numpy as np

from server.quality.measures import Predictions, standard_error, wilson
from server.schemas.fewshot import Order, Strategy

# strategies that draw shots at random
SEEDED: frozenset[Strategy] = frozenset({"random", "balanced"})


@dataclass(frozen=True, slots=True)
class Cell:
    strategy: Strategy
    k: int
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a query: the index of the true label, the probability of each label, and the costs.

    `seconds` is None unless the query was timed.
    """

    truth: int
    probabilities: list[float]
    prompt_tokens: int
    cached_tokens: int
    media: int
    media_encoded: int
    seconds: float | None = None


def grid(ks: Sequence[int], strategies: Sequence[Strategy], seeds: Sequence[int], *, is_shuffled: bool) -> list[Cell]:
    """Return the distinct cells: seeds differ only if something is drawn, and without shots all strategies are equal.

    `is_shuffled`: the order in the prompt, or of its permutations, is drawn too.
    """
    cells = []
    for k, strategy, seed in product(dict.fromkeys(ks), dict.fromkeys(strategies), dict.fromkeys(seeds)):
        is_seeded = k > 0 and (strategy in SEEDED or (is_shuffled and k > 1))
        cells.append(Cell(strategy if k else "first", k, seed if is_seeded else seeds[0]))
    return list(dict.fromkeys(cells))


def stratified(labels: Sequence[str], count: int, seed: int) -> list[int]:
    """Return `count` indices in order, each label in proportion to its share (the largest remainders round up)."""
    if count >= len(labels):
        return list(range(len(labels)))
    by_label: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_label.setdefault(label, []).append(index)
    rng = Random(seed)
    shares = {label: count * len(indices) / len(labels) for label, indices in by_label.items()}
    num_remaining = count - sum(int(share) for share in shares.values())
    # labels with equal remainders are in random order
    by_remainder = sorted(rng.sample(list(shares), len(shares)), key=lambda label: int(shares[label]) - shares[label])
    rounded_up = set(by_remainder[:num_remaining])
    samples = [rng.sample(indices, int(shares[label]) + (label in rounded_up)) for label, indices in by_label.items()]
    return sorted(index for sample in samples for index in sample)


def cell_result(cell: Cell, outcomes: Sequence[Outcome], labels: Sequence[str]) -> dict[str, Any]:
    """Return the record of a finished cell. Costs are means over its queries."""
    predictions = Predictions(np.array([o.probabilities for o in outcomes]), np.array([o.truth for o in outcomes]))
    return {
        **asdict(cell),
        "status": "completed",
        **predictions.summary(labels),
        "cost": {
            name: fmean(getattr(outcome, name) for outcome in outcomes)
            for name in ("prompt_tokens", "cached_tokens", "media", "media_encoded")
        },
        "latency": _latency([outcome.seconds for outcome in outcomes if outcome.seconds is not None]),
        "error": None,
    }


def failed_cell(cell: Cell, code: str, message: str) -> dict[str, Any]:
    """Return the record of a cell that failed."""
    return {**asdict(cell), "status": "failed", "error": {"code": code, "message": message}}


def _latency(seconds: Sequence[float]) -> dict[str, Any]:
    if not seconds:
        return {"queries": 0, "median_seconds": None, "p90_seconds": None}
    median, p90 = np.quantile(seconds, [0.5, 0.9])
    return {"queries": len(seconds), "median_seconds": float(median), "p90_seconds": float(p90)}


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per strategy and k that has a finished cell: the means over seeds.

    The number of answers for the interval is that of the queries, since all seeds run the same queries.
    """
    finished = [cell for cell in cells if cell["status"] == "completed"]
    by_setting = sorted(finished, key=_setting)
    return [_row(list(group)) for _, group in groupby(by_setting, key=_setting)]


def _setting(cell: dict[str, Any]) -> tuple[int, str]:
    return cell["k"], cell["strategy"]


def _row(cells: list[dict[str, Any]]) -> dict[str, Any]:
    first, accuracies = cells[0], [cell["accuracy"] for cell in cells]
    accuracy, total = fmean(accuracies), first["queries"]
    best = max(cells, key=lambda cell: cell["accuracy"])
    return {
        "strategy": first["strategy"],
        "k": first["k"],
        "seeds": len(cells),
        "queries": total,
        "accuracy": accuracy,
        "accuracy_interval": list(wilson(accuracy * total, total)),
        "standard_error": standard_error(accuracy * total, total),
        "lowest_accuracy": min(accuracies),
        "highest_accuracy": max(accuracies),
        "best_seed": best["seed"],
        **{name: fmean(cell[name] for cell in cells) for name in ("expected_calibration_error", "brier", "nll")},
        "prompt_tokens": fmean(cell["cost"]["prompt_tokens"] for cell in cells),
    }


@dataclass(frozen=True, slots=True)
class Baseline:
    """The accuracy of always answering with the most frequent label."""

    label: str
    accuracy: float


def baseline(answers: Sequence[str]) -> Baseline:
    label, count = Counter(answers).most_common(1)[0]
    return Baseline(label, count / len(answers))


def recommend(
    rows: Sequence[dict[str, Any]], support_set: str, version: int, order: Order | None, always: Baseline
) -> dict[str, Any] | None:
    """Return the setting with the smallest k within one standard error of the best, if any cell has finished."""
    if not rows:
        return None
    best = max(rows, key=lambda row: (row["accuracy"], -row["k"]))
    candidates = [row for row in rows if row["accuracy"] >= best["accuracy"] - best["standard_error"]]
    chosen = min(candidates, key=lambda row: (row["k"], -row["accuracy"], row["prompt_tokens"]))
    examples = {
        "support_set": support_set,
        "version": version,
        "k": chosen["k"],
        "strategy": chosen["strategy"],
        "seed": chosen["best_seed"],
    }
    return {
        "examples": examples if order is None else {**examples, "order": order},
        "accuracy": chosen["accuracy"],
        "accuracy_interval": chosen["accuracy_interval"],
        "reason": " ".join(_reason(chosen, best, always)),
    }


def _reason(chosen: dict[str, Any], best: dict[str, Any], always: Baseline) -> list[str]:
    low, high = chosen["accuracy_interval"]
    sentences = [
        f"{_name(chosen)} has an accuracy of {chosen['accuracy']:.3f} on {chosen['queries']} left-out examples "
        f"(95% interval {low:.3f} to {high:.3f}), with {chosen['prompt_tokens']:.0f} prompt tokens per query."
    ]
    if chosen is best:
        sentences.append("No other setting is more accurate with as few shots.")
    else:
        sentences.append(
            f"The best setting, {_name(best)}, has an accuracy of {best['accuracy']:.3f} with "
            f"{best['prompt_tokens']:.0f} tokens; the difference is within one standard error "
            f"({best['standard_error']:.3f})."
        )
    if low <= always.accuracy:
        sentences.append(
            f"This is not significantly better than always answering {always.label!r}, whose accuracy is "
            f"{always.accuracy:.3f}."
        )
    return sentences


def _name(row: dict[str, Any]) -> str:
    return f"{row['strategy']} with k={row['k']}" if row["k"] else "no shots"
