"""The plan of an evaluation: checked and stored when it is requested, and executed later by an evaluation runner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import InvalidRequest
from server.fewshot.classification import Candidate, read_candidates
from server.fewshot.prompting import find_template
from server.fewshot.shots import SelectionError, check_selection
from server.fewshot.templates import Template
from server.quality.evaluation import Cell, grid, stratified
from server.schemas.fewshot import Order, WeighingFields
from server.schemas.support_sets import EvaluateRequest
from server.served_model import ServedModel
from server.store.records import Example, SupportSet

MAX_CELLS = 256
DEFAULT_K = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The work of an evaluation; `queries` has the ids of the examples that are left out in turn."""

    template: Any
    order: Order | None
    candidates: list[Candidate]
    weighing: dict[str, Any]
    cells: list[Cell]
    queries: list[str]


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


def answer_of(example: Example) -> str:
    """Return the correct answer of an example: its label or, without one, its text."""
    return example.label or example.text


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
    for cell in cells:
        if cell.k:
            _check_cell(cell, num_selectable, fields.order)
    return cells


def _check_cell(cell: Cell, num_selectable: int, order: Order | None) -> None:
    try:
        check_selection(cell.strategy, num_selectable, cell.k, order)
    except SelectionError as error:
        raise InvalidRequest(f"{error} (one example is left out)", param=error.field) from None


def _check_answers(examples: Sequence[Example], labels: set[str]) -> None:
    for example in examples:
        if not answer_of(example):
            message = f"the example {example.id!r} has neither a label nor a text, so it has no correct answer"
            raise InvalidRequest(message, param="candidates")
        if answer_of(example) not in labels:
            message = f"the answer {answer_of(example)[:80]!r} of the example {example.id!r} is not a candidate"
            raise InvalidRequest(message, param="candidates")
