"""Leave-one-out evaluation of a support set: the plan of its cells, their results, and the recommended setting.

A cell is a strategy, a number of shots and a seed. In a cell each example is the query once, and its shots are selected
from the other examples, as for a request. This estimates the accuracy of a set without any other labelled data. A plan is
checked and stored when it is requested, and executed later by an evaluation runner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from random import Random
from statistics import fmean
from typing import Any

import numpy as np

from server.errors import InvalidRequest
from server.fewshot.candidates import Candidate, answer_of, read_candidates
from server.fewshot.classification import IN_CONTEXT
from server.fewshot.prompting import find_template
from server.fewshot.shots import SelectionError, check_selection
from server.fewshot.templates import Template
from server.quality.measures import Predictions, standard_error, wilson
from server.schemas.fewshot import Order, Strategy, WeighingFields
from server.schemas.stored import EvaluateRequest
from server.served_model import ServedModel
from server.store.records import Example, SupportSet

MAX_CELLS = 256
DEFAULT_K = (0, 1, 2, 4, 8, 16)
# strategies that draw shots at random
SEEDED: frozenset[Strategy] = frozenset({"random", "balanced"})


@dataclass(frozen=True, slots=True)
class Cell:
    strategy: Strategy
    k: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The work of an evaluation; `queries` has the ids of the examples that are left out in turn."""

    template: Any
    order: Order | None
    candidates: list[Candidate]
    weighing: dict[str, Any]
    cells: list[Cell]
    queries: list[str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a query: the true label's index, each label's probability, the costs, and the time if it was taken."""

    truth: int
    probabilities: list[float]
    prompt_tokens: int
    cached_tokens: int
    media: int
    media_encoded: int
    seconds: float | None = None


def make_plan(fields: EvaluateRequest, support_set: SupportSet, model: ServedModel, max_media: int) -> Plan:
    """Return the plan of a request. Raises `InvalidRequest` for an evaluation that is impossible with these examples."""
    examples = support_set.examples
    template = find_template(fields.template, model)
    cells = _cells(fields, len(examples) - 1, template, max_media)
    indices = stratified([answer_of(example) for example in examples], fields.max_queries, fields.seed)
    candidates = read_candidates(fields.candidates or dict.fromkeys(map(answer_of, examples)))
    _check_answers(examples, {candidate.label for candidate in candidates})
    return Plan(
        template=fields.template if isinstance(fields.template, str) else fields.template.model_dump(),
        order=fields.order,
        candidates=candidates,
        weighing=fields.model_dump(include=set(WeighingFields.model_fields)),
        cells=cells,
        queries=[examples[index].id for index in indices],
    )


def _cells(fields: EvaluateRequest, num_selectable: int, template: Template, max_media: int) -> list[Cell]:
    if num_selectable < 1:
        raise InvalidRequest("an evaluation needs a support set with at least two examples", param="k")
    max_k = min(num_selectable, max_media - 1) if template.has_media else num_selectable
    ks = fields.k or [k for k in DEFAULT_K if k <= max_k]
    strategies = fields.strategies or (["random", "rices_image"] if template.has_media else ["random"])
    is_shuffled = fields.order == "shuffled" or fields.permutations > 1
    cells = grid(ks, strategies, fields.seeds, is_shuffled=is_shuffled)
    if len(cells) > MAX_CELLS:
        message = f"{len(cells)} cells of k, strategy and seed, the limit is {MAX_CELLS}"
        raise InvalidRequest(message, param="k")
    try:
        for cell in cells:
            if cell.k:
                check_selection(cell.strategy, num_selectable, cell.k, fields.order)
    except SelectionError as error:
        raise InvalidRequest(f"{error} (one example is left out)", param=error.field) from None
    return cells


def _check_answers(examples: Sequence[Example], labels: set[str]) -> None:
    for example in examples:
        answer = answer_of(example)
        if not answer:
            message = f"the example {example.id!r} has neither a label nor a text, so it has no correct answer"
            raise InvalidRequest(message, param="candidates")
        if answer not in labels:
            message = f"the answer {answer[:80]!r} of the example {example.id!r} is not a candidate"
            raise InvalidRequest(message, param="candidates")


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
    """Return a row per strategy and k that has a finished cell: the means over seeds."""
    by_setting: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["status"] == "completed":
            by_setting.setdefault((cell["k"], cell["strategy"]), []).append(cell)
    return [_row(by_setting[setting]) for setting in sorted(by_setting)]


def _row(cells: list[dict[str, Any]]) -> dict[str, Any]:
    # the interval is for as many answers as there are queries, since all seeds run the same
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
    setting = {"k": chosen["k"], "strategy": chosen["strategy"], "seed": chosen["best_seed"]}
    return {
        "examples": {"support_set": support_set, "version": version, **setting, **({"order": order} if order else {})},
        "method": IN_CONTEXT,
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
