"""Leave-one-out over a support set, as far as it is arithmetic: which cells to run, what one says, and what to send.

A cell is a strategy, a number of shots and a seed. In it each example is a query once, and its shots are chosen from the
others, as a request would choose them. So the set says how well it will do before there is any other labelled data.
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

from server.quality.measures import Judged, standard_error, wilson
from server.schemas.fewshot import Order, Strategy

# strategies that draw their shots
SEEDED: frozenset[Strategy] = frozenset({"random", "balanced"})


@dataclass(frozen=True, slots=True)
class Cell:
    strategy: Strategy
    k: int
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One query: the right label's place, each label's probability, and what it took. `seconds`: where it was timed."""

    truth: int
    probabilities: list[float]
    prompt_tokens: int
    cached_tokens: int
    media: int
    media_encoded: int
    seconds: float | None = None


def grid(ks: Sequence[int], strategies: Sequence[Strategy], seeds: Sequence[int], *, is_shuffled: bool) -> list[Cell]:
    """Cells that can differ: a seed counts only where something is drawn, and no shots are no shots by any strategy.

    `is_shuffled`: the order in the prompt, or one of several orders, is drawn too.
    """
    cells = []
    for k, strategy, seed in product(dict.fromkeys(ks), dict.fromkeys(strategies), dict.fromkeys(seeds)):
        is_seeded = k > 0 and (strategy in SEEDED or (is_shuffled and k > 1))
        cells.append(Cell(strategy if k else "first", k, seed if is_seeded else seeds[0]))
    return list(dict.fromkeys(cells))


def stratified(labels: Sequence[str], count: int, seed: int) -> list[int]:
    """Places of `count` of these, each label by its share (the largest remainders round up), in their order."""
    if count >= len(labels):
        return list(range(len(labels)))
    by_label: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        by_label.setdefault(label, []).append(place)
    rng = Random(seed)
    shares = {label: count * len(places) / len(labels) for label, places in by_label.items()}
    left = count - sum(int(share) for share in shares.values())
    # equal remainders are drawn
    by_remainder = sorted(rng.sample(list(shares), len(shares)), key=lambda label: int(shares[label]) - shares[label])
    extra = set(by_remainder[:left])
    picked = [rng.sample(places, int(shares[label]) + (label in extra)) for label, places in by_label.items()]
    return sorted(place for places in picked for place in places)


def cell_result(cell: Cell, outcomes: Sequence[Outcome], labels: Sequence[str]) -> dict[str, Any]:
    """What a finished cell is remembered by. Cost is the mean over its queries."""
    judged = Judged(np.array([o.probabilities for o in outcomes]), np.array([o.truth for o in outcomes]))
    return {
        **asdict(cell),
        "status": "completed",
        **judged.summary(labels),
        "cost": {
            name: fmean(getattr(outcome, name) for outcome in outcomes)
            for name in ("prompt_tokens", "cached_tokens", "media", "media_encoded")
        },
        "latency": _latency([outcome.seconds for outcome in outcomes if outcome.seconds is not None]),
        "error": None,
    }


def failed_cell(cell: Cell, code: str, message: str) -> dict[str, Any]:
    return {**asdict(cell), "status": "failed", "error": {"code": code, "message": message}}


def _latency(seconds: Sequence[float]) -> dict[str, Any]:
    if not seconds:
        return {"queries": 0, "median_seconds": None, "p90_seconds": None}
    median, p90 = np.quantile(seconds, [0.5, 0.9])
    return {"queries": len(seconds), "median_seconds": float(median), "p90_seconds": float(p90)}


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each strategy and k with a finished cell: the mean over seeds.

    The interval is for as many answers as there are queries, not times the seeds: the same queries come again.
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
    """Always giving the answer that is right most often."""

    label: str
    accuracy: float


def baseline(truths: Sequence[str]) -> Baseline:
    label, count = Counter(truths).most_common(1)[0]
    return Baseline(label, count / len(truths))


def recommend(
    rows: Sequence[dict[str, Any]], support_set: str, version: int, order: Order | None, always: Baseline
) -> dict[str, Any] | None:
    """The smallest k, and its strategy, that is within one standard error of the best; None without a finished row."""
    if not rows:
        return None
    best = max(rows, key=lambda row: (row["accuracy"], -row["k"]))
    near = [row for row in rows if row["accuracy"] >= best["accuracy"] - best["standard_error"]]
    chosen = min(near, key=lambda row: (row["k"], -row["accuracy"], row["prompt_tokens"]))
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
    said = [
        f"{_name(chosen)} answers {chosen['accuracy']:.3f} of {chosen['queries']} left-out examples right "
        f"(95% interval {low:.3f} to {high:.3f}), with {chosen['prompt_tokens']:.0f} prompt tokens a query."
    ]
    if chosen is best:
        said.append("No other setting answers more of them right with as few shots.")
    else:
        said.append(
            f"The best, {_name(best)}, answers {best['accuracy']:.3f} right with {best['prompt_tokens']:.0f} tokens; "
            f"the difference is within one standard error ({best['standard_error']:.3f})."
        )
    if low <= always.accuracy:
        said.append(
            f"This is not shown to be better than always answering {always.label!r}, which is right in "
            f"{always.accuracy:.3f}."
        )
    return said


def _name(row: dict[str, Any]) -> str:
    return f"{row['strategy']} with k={row['k']}" if row["k"] else "no shots"
