"""The results of an evaluation by setting, and the setting that it recommends to send.

Of the settings within one standard error of the most accurate one, the cheapest is recommended: a method without a prompt
costs least, then few shots. Of methods without a prompt, the one that the model's prior expects to be best comes first. The
most accurate of many settings owes a part of its lead to chance. A control is never recommended, and neither is a setting
that is no more accurate than always giving the most frequent answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from server.fewshot.methods.likeness import Array
from server.fewshot.methods.paired import Paired
from server.quality.measures import standard_error, wilson
from server.schemas.fewshot import Order

# a difference that chance alone would give less often is called more than chance
MAX_P_VALUE = 0.05


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per method, strategy, k, form and control that has a finished cell: the means over seeds."""
    by_setting: dict[tuple[str, int, str, bool, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["status"] == "completed":
            by_setting.setdefault(_setting(cell), []).append(cell)
    return [_row(by_setting[setting]) for setting in sorted(by_setting)]


def _setting(entry: Mapping[str, Any]) -> tuple[str, int, str, bool, str]:
    """Return what all cells of a row have in common, in the order of the rows: without a prompt first, controls last."""
    return entry["control"] or "", _num_shots(entry), entry["strategy"] or "", _is_alone(entry), entry["method"]


def _is_alone(entry: Mapping[str, Any]) -> bool:
    return bool(entry["shots_attend"] == "alone")


def _row(cells: list[dict[str, Any]]) -> dict[str, Any]:
    # the interval is for as many answers as there are queries, since all seeds run the same
    first, accuracies = cells[0], [cell["accuracy"] for cell in cells]
    accuracy, total = fmean(accuracies), first["queries"]
    best = max(cells, key=lambda cell: cell["accuracy"])
    return {
        "method": first["method"],
        "strategy": first["strategy"],
        "k": first["k"],
        "shots_attend": first["shots_attend"],
        "control": first["control"],
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
        "latency": _mean_latency([cell["latency"] for cell in cells]),
    }


def _mean_latency(latencies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of timed queries, and the mean over the seeds; methods without a prompt have no timed query."""
    timed = [latency for latency in latencies if latency["queries"]]
    means = {name: fmean(each[name] for each in timed) if timed else None for name in ("median_seconds", "p90_seconds")}
    return {"queries": sum(latency["queries"] for latency in timed), **means}


@dataclass(frozen=True, slots=True)
class Baseline:
    """The accuracy of always answering with the most frequent label, and which of the left-out examples have it."""

    label: str
    accuracy: float
    is_correct: tuple[bool, ...] = field(default=(), repr=False, compare=False)


def baseline(answers: Sequence[str]) -> Baseline:
    label, count = Counter(answers).most_common(1)[0]
    return Baseline(label, count / len(answers), tuple(answer == label for answer in answers))


def recommend(
    cells: Sequence[dict[str, Any]],
    support_set: str,
    version: int,
    order: Order | None,
    always: Baseline,
    prior: str | None,
) -> dict[str, Any] | None:
    """Return the cheapest setting that is as accurate as the best one within the standard error of the difference.

    `prior`: the method by likeness that the model's own evaluation found best with as many examples. None if no cell has
    finished, or if no setting is more accurate than always giving the most frequent answer.
    """
    rows = [row for row in summarise(cells) if row["control"] is None]
    useful = [row for row in rows if row["accuracy"] > always.accuracy]
    if not useful:
        return None
    best = _most_accurate(useful)
    candidates = [row for row in useful if _is_close(row, best, cells)]
    chosen = min(
        candidates,
        key=lambda row: (_num_shots(row), row["method"] != prior, -row["accuracy"], row["prompt_tokens"], row["nll"]),
    )
    examples = {"support_set": support_set, "version": version}
    if chosen["k"] is not None:
        examples |= {"k": chosen["k"], "strategy": chosen["strategy"], "seed": chosen["best_seed"]}
        examples |= {"order": order} if order else {}
    request = {
        "examples": examples,
        **({"shots_attend": "alone"} if _is_alone(chosen) else {}),
        "method": chosen["method"],
        **({} if chosen["k"] is None else {"temperature": chosen["temperature"]}),
    }
    return {
        "request": request,
        "accuracy": chosen["accuracy"],
        "accuracy_interval": chosen["accuracy_interval"],
        "reason": " ".join(_reason(chosen, best, rows, cells, always)),
    }


def _is_close(row: Mapping[str, Any], best: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> bool:
    if (paired := compare(best, row, cells)) is not None:
        return not paired.is_clear
    return bool(row["accuracy"] >= best["accuracy"] - best["standard_error"])


def compare(first: Mapping[str, Any], second: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Paired | None:
    """Compare two rows on the same left-out examples; None for cells that were stored without the single answers."""
    return _paired(_shares(first, cells), _shares(second, cells))


def _paired(first: Array, second: Array) -> Paired | None:
    return Paired.of(first, second) if len(first) == len(second) > 0 else None


def _shares(row: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Array:
    """Return the share of a row's seeds that answer correctly, for each left-out example [N]."""
    answers = [
        cell["is_correct"]
        for cell in cells
        if cell["status"] == "completed" and "is_correct" in cell and _setting(cell) == _setting(row)
    ]
    return np.mean(answers, axis=0, dtype=np.float64) if answers else np.empty(0)


def explain(
    rows: Sequence[dict[str, Any]], always: Baseline, single: Sequence[str], *, lacks_likeness: bool
) -> str | None:
    """Return why nothing is recommended, and what was not judged: the only examples of the labels `single` were kept.

    `lacks_likeness`: methods by likeness could not be measured, although requests can use them.
    """
    sentences = []
    if rows and lacks_likeness:
        sentences.append(
            "No setting is recommended: leave-one-out could measure in_context alone, because the other methods need a "
            "second example of a label to leave one out. Add a second example of each label. To choose among the settings "
            "of in_context, evaluate this method alone."
        )
    elif rows and (best := _most_accurate(rows))["accuracy"] <= always.accuracy:
        sentences.append(
            f"No setting is recommended: the most accurate one, {name_of(best)}, has an accuracy of {best['accuracy']:.3f} "
            f"on {best['queries']} left-out examples, no more than always answering {always.label!r}, whose "
            f"accuracy is {always.accuracy:.3f}."
        )
    if single:
        is_one = len(single) == 1
        subject = f"The label {single[0]!r} has" if is_one else f"{len(single)} labels, {single[0]!r} among them, have"
        sentences.append(
            f"{subject} a single example{'' if is_one else ' each'}, so leave-one-out cannot judge "
            f"{'it' if is_one else 'them'}: add a second example{'' if is_one else ' of each'}."
        )
    return " ".join(sentences) or None


def _most_accurate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: (row["accuracy"], -_num_shots(row), -row["prompt_tokens"]))


def _num_shots(entry: Mapping[str, Any]) -> int:
    """Return the shots in the prompt, or -1 without a prompt."""
    return -1 if entry["k"] is None else int(entry["k"])


def _reason(
    chosen: dict[str, Any],
    best: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    cells: Sequence[dict[str, Any]],
    always: Baseline,
) -> list[str]:
    low, high = chosen["accuracy_interval"]
    rival = _rival(chosen, rows) if chosen is best else best
    sentences = [
        f"{name_of(chosen)} has an accuracy of {chosen['accuracy']:.3f} on {chosen['queries']} left-out examples "
        f"(95% interval {low:.3f} to {high:.3f}), {_cost(chosen)}."
    ]
    if rival is None:
        sentences.append("No other setting was evaluated.")
    elif rival["accuracy"] > chosen["accuracy"]:
        sentences.append(
            f"The most accurate setting, {name_of(rival)}, has {rival['accuracy']:.3f} {_cost(rival)}; the difference is "
            "within one standard error."
        )
    else:
        sentences.append(f"No other setting is more accurate; {name_of(rival)} has {rival['accuracy']:.3f}.")
    named = {chosen["method"]} if rival is None else {chosen["method"], rival["method"]}
    if rival is not None and (paired := compare(chosen, rival, cells)) is not None:
        first, second = (" is right more often", "") if paired.has_shares else (" alone is right", " alone")
        sentences.append(
            f"{name_of(chosen)}{first} on {paired.wins} of them, {name_of(rival)}{second} on {paired.losses}: "
            f"{_verdict(paired, 'more than chance', 'this may be chance')}."
            if paired.wins or paired.losses
            else "Both classify the same examples correctly."
        )
    if accuracies := _other_methods(named, rows):
        sentences.append(f"Of the other methods, the best settings have: {', '.join(accuracies)}.")
    sentences.append(_against(always, _paired(_shares(chosen, cells), np.array(always.is_correct, np.float64)), low))
    return list(filter(None, sentences))


def _rival(chosen: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the most accurate setting of another method or, without any, of the same one."""
    rivals = [row for row in rows if row is not chosen]
    return _most_accurate([row for row in rivals if row["method"] != chosen["method"]] or rivals) if rivals else None


def _verdict(paired: Paired, clear: str, unclear: str) -> str:
    chance = clear if paired.p_value < MAX_P_VALUE else unclear
    return f"{chance} (p = {paired.p_value:.2g} by a {'paired test' if paired.has_shares else 'sign test'})"


def _against(always: Baseline, paired: Paired | None, low: float) -> str:
    """Return a sentence on the lead over always giving the most frequent answer; none if it is clear from the interval."""
    answer = f"always answering {always.label!r} ({always.accuracy:.3f})"
    if paired is not None:
        return f"Its lead over {answer} {_verdict(paired, 'is more than chance', 'may be chance')}."
    return f"This is not significantly better than {answer}." if low <= always.accuracy else ""


def _other_methods(named: Collection[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the highest accuracy of each method that is not named, the best method first."""
    accuracies: dict[str, float] = {}
    for row in rows:
        if row["method"] not in named:
            accuracies[row["method"]] = max(row["accuracy"], accuracies.get(row["method"], 0.0))
    ranked = sorted(accuracies.items(), key=lambda item: -item[1])
    return [f"{method} {accuracy:.3f}" for method, accuracy in ranked]


def name_of(row: Mapping[str, Any]) -> str:
    """Return the name of a setting in a sentence."""
    if row["k"] is None:
        return str(row["method"])
    if not row["k"]:
        return f"{row['method']} without shots"
    form = " and shots that attend alone" if _is_alone(row) else ""
    return f"{row['method']} by {row['strategy']} with k={row['k']}{form}"


def _cost(row: dict[str, Any]) -> str:
    return "without a prompt" if row["k"] is None else f"with {row['prompt_tokens']:.0f} prompt tokens per query"
