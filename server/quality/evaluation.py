"""Leave-one-out evaluation of a support set: the plan of its cells, and their results.

A cell is a method and, for methods with a prompt, a strategy, a number of shots, a form and a seed. In a cell each example
is the query once. The shots are selected from the other examples, as for a request, and likeness compares with the others.
One example of each other label is left out with the query, so that its label is not rarer than in a request. A label's only
example is kept if at least two labels have more of them. This estimates the accuracy of a set without any other labelled
data. A plan is checked and stored when it is requested, and executed later by an evaluation runner.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from random import Random
from statistics import fmean
from typing import Any, get_args

import numpy as np

from model.prompt import ShotsAttend
from server.errors import InvalidRequest
from server.fewshot.candidates import Candidate, candidates_of, read_candidates
from server.fewshot.classification import combine
from server.fewshot.confidence import SHOWN_POINTS, curve, fit_temperatures, probabilities
from server.fewshot.methods import IN_CONTEXT, METHODS, parts_of
from server.fewshot.methods.likeness import KEPT, Array, folds
from server.fewshot.prompting import check_alone, find_template
from server.fewshot.shots import check_selection
from server.fewshot.templates import Template
from server.prompt import order_matters
from server.quality.controls import COMPARED_METHOD, ENCODER_FEATURES, check_controls, strategy_of_controls
from server.quality.learning_curve import Curve
from server.quality.measures import Predictions
from server.schemas.fewshot import Method, Order, Strategy, WeighingFields
from server.schemas.stored import Control, EvaluateRequest
from server.served_model import ServedModel
from server.store.examples import Examples, answer_of
from server.store.records import Example, SupportSet

MAX_PROMPTS = 256
DEFAULT_K = (0, 1, 2, 4, 8, 16)
# strategies that draw shots at random
SEEDED: frozenset[Strategy] = frozenset({"random", "balanced"})


@dataclass(frozen=True, slots=True)
class PromptSetting:
    """The shots of a prompt: how many, how they are selected, and what they attend to."""

    strategy: Strategy
    k: int
    seed: int
    control: Control | None = None
    shots_attend: ShotsAttend = "previous"


@dataclass(frozen=True, slots=True)
class Cell:
    """A method and the setting of its prompt, which methods by likeness do not have."""

    strategy: Strategy | None = None
    k: int | None = None
    seed: int | None = None
    method: Method = IN_CONTEXT
    control: Control | None = None
    shots_attend: ShotsAttend | None = None

    @classmethod
    def of(cls, prompt: PromptSetting, method: Method = IN_CONTEXT) -> Cell:
        return cls(prompt.strategy, prompt.k, prompt.seed, method, prompt.control, prompt.shots_attend)

    @property
    def prompt(self) -> PromptSetting | None:
        if self.strategy is None or self.k is None or self.seed is None or self.shots_attend is None:
            return None
        return PromptSetting(self.strategy, self.k, self.seed, self.control, self.shots_attend)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts whose log-probabilities are added."""
        return (ENCODER_FEATURES,) if self.control == ENCODER_FEATURES else parts_of(self.method)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """The work of an evaluation; `queries` has the ids of the examples that are left out in turn."""

    template: Any
    order: Order | None
    candidates: list[Candidate]
    weighing: dict[str, Any]
    cells: list[Cell]
    queries: list[str]

    @property
    def methods(self) -> set[Method]:
        return {cell.method for cell in self.cells}

    @property
    def likeness_parts(self) -> set[str]:
        """The names of the parts by likeness of all methods."""
        return {part for cell in self.cells for part in cell.parts} - {IN_CONTEXT}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a query: the true label's index, the log-probabilities of the labels by each part, and the costs.

    `seconds` is the time that the query took, if it was measured.
    """

    truth: int
    logs: dict[str, Array]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    media: int = 0
    media_encoded: int = 0
    seconds: float | None = None

    def log_probabilities(self, cell: Cell) -> Array:
        """Return the log-probabilities [C] of the labels by the method of a cell."""
        return combine([self.logs[part] for part in cell.parts])


def make_plan(fields: EvaluateRequest, support_set: SupportSet, model: ServedModel, max_media: int) -> EvaluationPlan:
    """Return the plan of a request. Raises `InvalidRequest` for an evaluation that is impossible with these examples."""
    examples = support_set.examples
    template = find_template(fields.template, model)
    prompts = _prompts(fields, len(examples) - 1, template, model, max_media)
    candidates = read_candidates(fields.candidates) or candidates_of(examples)
    _check_answers(examples, {candidate.label for candidate in candidates})
    if len(candidates) == 1:
        message = f"all examples have the answer {candidates[0].label[:80]!r}, an evaluation needs a second candidate"
        raise InvalidRequest(message, param="candidates")
    methods, queries = _methods(fields.methods, examples, candidates, template), _queries(examples, fields)
    check_controls(fields.controls, methods, template, model)
    if any(IN_CONTEXT in parts_of(method) for method in methods):
        _check_queries(queries, template)
    if "alone" in fields.forms:
        check_alone(examples, template, model)
    return EvaluationPlan(
        template=fields.template if isinstance(fields.template, str) else fields.template.model_dump(),
        order=fields.order,
        candidates=candidates,
        weighing=fields.model_dump(include=set(WeighingFields.model_fields)),
        cells=_cells(methods, prompts) + _control_cells(fields, prompts),
        queries=[query.id for query in queries],
    )


def _queries(examples: Examples[Example], fields: EvaluateRequest) -> Sequence[Example]:
    """Return the examples that are left out in turn.

    If all have labels, the only example of a label is none of them, unless fewer than two labels would be left: always
    answering with the same label would then be perfect. Texts may be answers of their own, which the language model can
    know without another example.
    """
    judged: Sequence[Example] = examples
    if examples.are_labelled and len(repeated := _repeated_labels(examples)) > 1:
        judged = [example for example in examples if answer_of(example) in repeated]
    answers = [answer_of(example) for example in judged]
    return [judged[index] for index in stratified(answers, fields.max_queries, fields.seed)]


def _repeated_labels(examples: Examples[Example]) -> set[str]:
    """Return the labels, or other answers, of two or more examples."""
    return {answer for answer, indices in examples.by_answer.items() if len(indices) > 1}


def _prompts(
    fields: EvaluateRequest, num_selectable: int, template: Template, model: ServedModel, max_media: int
) -> list[PromptSetting]:
    if num_selectable < 1:
        message = f"an evaluation needs at least two examples, the support set has {num_selectable + 1}"
        raise InvalidRequest(message, param="support_set")
    max_k = min(num_selectable, max_media - 1) if template.has_media else num_selectable
    ks = fields.k or [k for k in DEFAULT_K if k <= max_k]
    if template.has_media and max(ks) >= max_media:
        message = f"k is at most {max_media - 1}: a request has at most {max_media} media, including the query"
        raise InvalidRequest(message, param="k")
    strategies = fields.strategies or (["random", "rices_image"] if template.has_media else ["random"])
    draws_orders = fields.order == "shuffled" or fields.permutations > 1
    shuffled = [form for form in fields.forms if draws_orders and order_matters(form, model)]
    prompts = grid(ks, strategies, fields.forms, fields.seeds, shuffled=shuffled)
    if len(prompts) > MAX_PROMPTS:
        message = f"{len(prompts)} combinations of k, strategy, form and seed, the limit is {MAX_PROMPTS}"
        raise InvalidRequest(message, param="k")
    try:
        for prompt in prompts:
            if prompt.k:
                check_selection(prompt.strategy, num_selectable, prompt.k, fields.order, within="")
    except InvalidRequest as error:
        raise InvalidRequest(f"{error} (one example is left out)", param=error.param) from None
    return prompts


def _cells(methods: Sequence[Method], prompts: Sequence[PromptSetting]) -> list[Cell]:
    """Return the cells, those without a prompt first; the methods of one prompt follow each other."""
    with_prompt = [method for method in methods if IN_CONTEXT in parts_of(method)]
    by_likeness = [Cell(method=method) for method in methods if method not in with_prompt]
    return by_likeness + [Cell.of(prompt, method) for prompt in prompts for method in with_prompt]


def _control_cells(fields: EvaluateRequest, prompts: Sequence[PromptSetting]) -> list[Cell]:
    """Return a cell per control; those of prompts have the most shots of all prompts, in the first form."""
    strategy, k = strategy_of_controls(fields.strategies), max(prompt.k for prompt in prompts)
    whole = PromptSetting(
        strategy if k else "first", k, fields.seeds[0], shots_attend=fields.forms[0] if k else "previous"
    )
    features = Cell(method=COMPARED_METHOD, control=ENCODER_FEATURES)
    return [
        features if control == ENCODER_FEATURES else Cell.of(replace(whole, control=control))
        for control in dict.fromkeys(fields.controls)
    ]


def _methods(
    requested: Sequence[Method], examples: Examples[Example], candidates: Sequence[Candidate], template: Template
) -> list[Method]:
    """Return the requested methods or, without any, all that these examples allow. Raises `InvalidRequest`."""
    obstacles = {method: _obstacle(method, examples, candidates, template) for method in requested or get_args(Method)}
    allowed = [method for method, obstacle in obstacles.items() if not obstacle]
    if requested and len(allowed) < len(obstacles):
        method, obstacle = next((method, obstacle) for method, obstacle in obstacles.items() if obstacle)
        raise InvalidRequest(f"{method} {obstacle}", param="methods")
    return allowed


def _obstacle(method: Method, examples: Examples[Example], candidates: Sequence[Candidate], template: Template) -> str:
    """Return why a method cannot be evaluated with these examples, or nothing if it can."""
    if method == IN_CONTEXT:
        return ""
    if not template.has_media or examples.first_without_media is not None:
        return "compares media, and an example or the template has none"
    least, by_answer = 1 if examples.are_labelled else 2, examples.by_answer
    labels = (candidate.label for candidate in candidates)
    if rare := next((label for label in labels if len(by_answer.get(label, ())) < least), None):
        number = "an example" if least == 1 else "two examples"
        return f"needs {number} of each candidate to leave one out, and {rare[:80]!r} has fewer"
    if len(_repeated_labels(examples)) < 2:
        return "leaves out one of several examples of a label, and fewer than two labels have two"
    if method in METHODS and len(examples) > (limit := METHODS[method].max_left_out):
        return f"is evaluated with up to {limit} examples, there are {len(examples)}"
    return ""


def _check_answers(examples: Examples[Example], labels: set[str]) -> None:
    for answer, indices in examples.by_answer.items():
        example = examples[indices[0]]
        if not answer:
            message = f"the example {example.id!r} has neither a label nor a text, so it has no correct answer"
            raise InvalidRequest(message, param="candidates")
        if answer not in labels:
            message = f"the answer {answer[:80]!r} of the example {example.id!r} is not a candidate"
            raise InvalidRequest(message, param="candidates")


def _check_queries(queries: Sequence[Example], template: Template) -> None:
    """Refuse a template with a placeholder that a query does not fill: each prompt of that query would fail."""
    for query in queries:
        values = {"media": query.media, "question": query.question, "text": query.text}
        if lack := next((name for name in sorted(template.query_fields) if not values[name]), None):
            message = f"the template {template.name!r} has {{{lack}}}, but the example {query.id!r} has none"
            raise InvalidRequest(message, param="template")


def grid(
    ks: Sequence[int],
    strategies: Sequence[Strategy],
    forms: Sequence[ShotsAttend],
    seeds: Sequence[int],
    *,
    shuffled: Collection[ShotsAttend] = (),
) -> list[PromptSetting]:
    """Return the distinct prompts: seeds differ only if something is drawn, and without shots all strategies are equal.

    So are the forms without shots. `shuffled`: the forms in which an order of the shots is drawn that has an effect.
    """
    prompts = []
    distinct = product(dict.fromkeys(ks), dict.fromkeys(strategies), dict.fromkeys(forms), dict.fromkeys(seeds))
    for k, strategy, form, seed in distinct:
        is_seeded = strategy in SEEDED or (form in shuffled and k > 1)
        setting = PromptSetting(strategy, k, seed if is_seeded else seeds[0], shots_attend=form)
        prompts.append(setting if k else PromptSetting("first", 0, seeds[0]))
    return list(dict.fromkeys(prompts))


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


def left_out_together(answers: Sequence[str]) -> Callable[[int], list[int]]:
    """Return a function from an example to those that are left out with it: itself, then one of each other label.

    Only examples of their labels are left out alone.
    """
    order = {label: number for number, label in enumerate(dict.fromkeys(answers))}
    labels = [order[answer] for answer in answers]
    fold_of, members = folds(np.array(labels)).tolist(), dict[int, list[int]]()
    for index, fold in enumerate(fold_of):
        members.setdefault(fold, []).append(index)

    def together(index: int) -> list[int]:
        if fold_of[index] == KEPT:
            return [index]
        # from the label after its own: those that are left out first differ between labels
        return sorted(members[fold_of[index]], key=lambda other: (labels[other] - labels[index]) % len(order))

    return together


def cell_result(
    cell: Cell, outcomes: Sequence[Outcome], labels: Sequence[str], learning: Curve | None
) -> dict[str, Any]:
    """Return the record of a finished cell. Costs are means over its queries.

    Each query's probabilities have the temperature that the other queries have, so that they are measured on new ones. The
    curve of abstention has the temperature of all, as a request does.
    """
    logs = np.array([outcome.log_probabilities(cell) for outcome in outcomes])
    truth = np.array([outcome.truth for outcome in outcomes])
    temperature, of_others = fit_temperatures(cell.method, logs, truth)
    predictions = Predictions(probabilities(logs, of_others[:, None]), truth)
    return {
        **asdict(cell),
        "status": "completed",
        **predictions.summary(labels),
        "is_correct": predictions.is_correct.tolist(),
        "answers": [labels[index] for index in predictions.labels],
        "temperature": temperature,
        "curve": [asdict(point) for point in curve(probabilities(logs, temperature), truth, SHOWN_POINTS)],
        "cost": {
            name: fmean(getattr(outcome, name) for outcome in outcomes)
            for name in ("prompt_tokens", "cached_tokens", "media", "media_encoded")
        },
        "latency": _measured_latency([outcome.seconds for outcome in outcomes if outcome.seconds is not None]),
        **({"learning_curve": learning} if learning else {}),
        "error": None,
    }


def failed_cell(cell: Cell, code: str, message: str) -> dict[str, Any]:
    return {**asdict(cell), "status": "failed", "error": {"code": code, "message": message}}


def _measured_latency(seconds: Sequence[float]) -> dict[str, Any]:
    if not seconds:
        return {"queries": 0, "median_seconds": None, "p90_seconds": None}
    median, p90 = np.quantile(seconds, [0.5, 0.9])
    return {"queries": len(seconds), "median_seconds": float(median), "p90_seconds": float(p90)}
