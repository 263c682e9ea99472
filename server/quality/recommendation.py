"""The results of an evaluation by setting, and the setting that it recommends to send.

Of the settings within one standard error of the most accurate one, the cheapest is recommended: a method without a prompt
costs least, then few shots. The most accurate of many settings owes a part of its lead to chance. A setting that is worse
than always giving the most frequent answer is never recommended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from server.quality.measures import standard_error, wilson
from server.schemas.fewshot import Order


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per method, strategy and k that has a finished cell: the means over seeds."""
    by_setting: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["status"] == "completed":
            # without a prompt, first
            setting = (-1 if cell["k"] is None else cell["k"], cell["strategy"] or "", cell["method"])
            by_setting.setdefault(setting, []).append(cell)
    return [_row(by_setting[setting]) for setting in sorted(by_setting)]


def _row(cells: list[dict[str, Any]]) -> dict[str, Any]:
    # the interval is for as many answers as there are queries, since all seeds run the same
    first, accuracies = cells[0], [cell["accuracy"] for cell in cells]
    accuracy, total = fmean(accuracies), first["queries"]
    best = max(cells, key=lambda cell: cell["accuracy"])
    return {
        "method": first["method"],
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
        **{name: best[name] for name in ("temperature", "curve")},
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
    """Return the cheapest setting within one standard error of the most accurate one.

    None if no cell has finished, or if all settings are less accurate than always giving the most frequent answer.
    """
    useful = [row for row in rows if row["accuracy"] >= always.accuracy]
    if not useful:
        return None
    best = _most_accurate(useful)
    candidates = [row for row in useful if row["accuracy"] >= best["accuracy"] - best["standard_error"]]
    chosen = min(candidates, key=lambda row: (_num_shots(row), -row["accuracy"], row["prompt_tokens"], row["nll"]))
    examples = {"support_set": support_set, "version": version}
    if chosen["k"] is not None:
        examples |= {"k": chosen["k"], "strategy": chosen["strategy"], "seed": chosen["best_seed"]}
        examples |= {"order": order} if order else {}
    return {
        "examples": examples,
        "method": chosen["method"],
        "temperature": None if chosen["k"] is None else chosen["temperature"],
        "accuracy": chosen["accuracy"],
        "accuracy_interval": chosen["accuracy_interval"],
        "reason": " ".join(_reason(chosen, best, rows, always)),
    }


def explain(rows: Sequence[dict[str, Any]], always: Baseline, single: Sequence[str]) -> str | None:
    """Return why nothing is recommended, and what leave-one-out cannot judge: the labels `single` have one example."""
    sentences = []
    if rows and (best := _most_accurate(rows))["accuracy"] < always.accuracy:
        sentences.append(
            f"No setting is recommended: the most accurate one, {_name(best)}, has an accuracy of {best['accuracy']:.3f} "
            f"on {best['queries']} left-out examples, less than always answering {always.label!r}, whose accuracy is "
            f"{always.accuracy:.3f}."
        )
    if single:
        is_one = len(single) == 1
        subject = f"The label {single[0]!r} has" if is_one else f"{len(single)} labels, {single[0]!r} among them, have"
        sentences.append(
            f"{subject} a single example{'' if is_one else ' each'}. When that is left out, none of its label is left, so "
            f"leave-one-out cannot judge it: add a second example{'' if is_one else ' of each'}."
        )
    return " ".join(sentences) or None


def _most_accurate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: (row["accuracy"], -_num_shots(row), -row["prompt_tokens"]))


def _num_shots(row: dict[str, Any]) -> int:
    """Return the shots in the prompt, or -1 without a prompt."""
    return -1 if row["k"] is None else int(row["k"])


def _reason(
    chosen: dict[str, Any], best: dict[str, Any], rows: Sequence[dict[str, Any]], always: Baseline
) -> list[str]:
    low, high = chosen["accuracy_interval"]
    sentences = [
        f"{_name(chosen)} has an accuracy of {chosen['accuracy']:.3f} on {chosen['queries']} left-out examples "
        f"(95% interval {low:.3f} to {high:.3f}), {_cost(chosen)}."
    ]
    if chosen["accuracy"] == best["accuracy"]:
        sentences.append("No other setting is more accurate.")
    else:
        sentences.append(
            f"The most accurate setting, {_name(best)}, has {best['accuracy']:.3f} {_cost(best)}; the difference is within "
            f"one standard error ({best['standard_error']:.3f})."
        )
    if accuracies := _other_methods({chosen["method"], best["method"]}, rows):
        sentences.append(f"Of the other methods, the best settings have: {', '.join(accuracies)}.")
    if low <= always.accuracy:
        sentences.append(
            f"This is not significantly better than always answering {always.label!r}, whose accuracy is "
            f"{always.accuracy:.3f}."
        )
    return sentences


def _other_methods(named: Collection[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the highest accuracy of each method that is not named, the best method first."""
    accuracies: dict[str, float] = {}
    for row in rows:
        if row["method"] not in named:
            accuracies[row["method"]] = max(row["accuracy"], accuracies.get(row["method"], 0.0))
    ranked = sorted(accuracies.items(), key=lambda item: -item[1])
    return [f"{method} {accuracy:.3f}" for method, accuracy in ranked]


def _name(row: dict[str, Any]) -> str:
    if row["k"] is None:
        return str(row["method"])
    return f"{row['method']} by {row['strategy']} with k={row['k']}" if row["k"] else f"{row['method']} without shots"


def _cost(row: dict[str, Any]) -> str:
    return "without a prompt" if row["k"] is None else f"with {row['prompt_tokens']:.0f} prompt tokens per query"
