"""Leave-one-out evaluations of support sets: asked for, watched, cancelled, and read with what they recommend to send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse, read_body
from server.api.routes.classify import check_distinct
from server.api.services import GivenServices, GivenTicket
from server.errors import InvalidRequest
from server.fewshot.candidates import distinct
from server.fewshot.prompting import template_of
from server.fewshot.selection import SelectionError, check
from server.fewshot.templates import Template
from server.quality.evaluation import Cell, baseline, grid, recommend, stratified, summarise
from server.quality.evaluation_runner import Plan, truth_of
from server.quality.evaluation_store import Evaluation
from server.schemas.base import Schema
from server.schemas.classify import MAX_CANDIDATES, CandidateField, WeighingFields, candidates_of
from server.schemas.completions import read, read_query
from server.schemas.fewshot import MAX_SHOTS, Order, Strategy, TemplateChoice
from server.services import Services
from server.store.records import Example, SupportSet

MAX_CELLS = 256
DEFAULT_K = (0, 1, 2, 4, 8, 16)

router = APIRouter()


class EvaluateRequest(WeighingFields):
    """`seed` draws the subsample; each of `seeds` draws shots, and their orders."""

    model: str | None = None
    version: int | None = Field(None, ge=1)
    k: list[Annotated[int, Field(ge=0, le=MAX_SHOTS)]] = Field([], max_length=32)
    strategies: list[Strategy] = Field([], max_length=16)
    seeds: list[Annotated[int, Field(ge=0, le=2**63 - 1)]] = Field([0], min_length=1, max_length=32)
    order: Order | None = None
    template: TemplateChoice = "classification"
    candidates: list[CandidateField] = Field([], max_length=MAX_CANDIDATES)
    max_queries: int = Field(200, ge=1, le=100_000)


class ListRequest(Schema):
    limit: Annotated[int, Field(ge=1, le=100, strict=False)] = 20
    after: Annotated[str, Field(max_length=128)] = ""
    support_set: Annotated[str, Field(min_length=1, max_length=128)] | None = None


@router.post("/v1/support_sets/{support_set}/evaluate")
async def create_evaluation(
    support_set: str, request: Request, services: GivenServices, ticket: GivenTicket
) -> Response:
    fields = read(EvaluateRequest, await read_body(request, services.settings) or b"{}")
    services.check_model(fields.model)
    found = await services.support_sets.get_version(support_set, fields.version)
    settled = make_plan(fields, found, services)
    plan = {
        "request": fields.model_dump(mode="json", exclude_unset=True),
        "settled": msgspec.to_builtins(settled),
        "truths": truths_of(settled, found),
        "num_examples": len(found.examples),
    }
    return JSONResponse(_shown(await services.evaluations.create(found.id, found.version, plan)), 202)


@router.get("/v1/evaluations")
async def list_evaluations(request: Request, services: GivenServices) -> Response:
    """The oldest first, without their cells."""
    fields = read_query(ListRequest, request.query_params)
    page = await services.evaluations.page(fields.support_set, fields.after, fields.limit + 1)
    shown = page[: fields.limit]
    return JSONResponse(
        {
            "object": "list",
            "data": [_head(evaluation) for evaluation in shown],
            "first_id": shown[0].id if shown else None,
            "last_id": shown[-1].id if shown else None,
            "has_more": len(page) > len(shown),
        }
    )


@router.get("/v1/evaluations/{evaluation_id}")
async def show_evaluation(evaluation_id: str, services: GivenServices) -> Response:
    return JSONResponse(_shown(await services.evaluations.get(evaluation_id)))


@router.post("/v1/evaluations/{evaluation_id}/cancel")
async def cancel_evaluation(evaluation_id: str, services: GivenServices) -> Response:
    return JSONResponse(_shown(await services.evaluations.cancel(evaluation_id)))


@router.delete("/v1/evaluations/{evaluation_id}")
async def delete_evaluation(evaluation_id: str, services: GivenServices) -> Response:
    await services.evaluations.delete(evaluation_id)
    return JSONResponse({"id": evaluation_id, "object": "evaluation", "deleted": True})


# what was asked, settled


def make_plan(fields: EvaluateRequest, found: SupportSet, services: Services) -> Plan:
    """Raises `InvalidRequest` for what these examples cannot be asked."""
    template = template_of(fields.template, services.model.config)
    cells = _cells(fields, found, template, services.settings.max_media_per_request)
    places = stratified([truth_of(example) for example in found.examples], fields.max_queries, fields.seed)
    queries = [found.examples[place] for place in places]
    candidates = check_distinct(candidates_of(fields.candidates) or distinct(map(truth_of, found.examples)))
    _check_truths(found.examples, {candidate.label for candidate in candidates})
    return Plan(
        template=fields.template if isinstance(fields.template, str) else fields.template.model_dump(),
        order=fields.order,
        candidates=candidates,
        weighing=fields.weighing(),
        cells=cells,
        queries=[example.id for example in queries],
    )


def truths_of(settled: Plan, found: SupportSet) -> list[str]:
    by_id = {example.id: truth_of(example) for example in found.examples}
    return [by_id[name] for name in settled.queries]


def _cells(fields: EvaluateRequest, found: SupportSet, template: Template, max_media: int) -> list[Cell]:
    num_others = len(found.examples) - 1
    if num_others < 1:
        raise InvalidRequest("leaving one out needs a support set of two examples or more", param="k")
    most = min(num_others, max_media - 1) if template.has_media else num_others
    ks = fields.k or [k for k in DEFAULT_K if k <= most]
    strategies = fields.strategies or (["random", "rices_image"] if template.has_media else ["random"])
    is_shuffled = fields.order == "shuffled" or fields.permutations > 1
    cells = grid(ks, strategies, fields.seeds, is_shuffled=is_shuffled)
    if len(cells) > MAX_CELLS:
        message = f"{len(cells)} cells of k, strategy and seed, the limit is {MAX_CELLS}"
        raise InvalidRequest(message, param="k")
    for cell in cells:
        if cell.k:
            _check_cell(cell, num_others, fields.order)
    return cells


def _check_cell(cell: Cell, num_others: int, order: Order | None) -> None:
    try:
        check(cell.strategy, num_others, cell.k, order)
    except SelectionError as error:
        raise InvalidRequest(f"{error} (one is left out)", param=error.field) from None


def _check_truths(examples: Sequence[Example], labels: set[str]) -> None:
    for example in examples:
        if not truth_of(example):
            message = f"the example {example.id!r} has neither label nor text: it has no right answer"
            raise InvalidRequest(message, param="candidates")
        if truth_of(example) not in labels:
            message = f"the example {example.id!r} is {truth_of(example)[:80]!r}, which is no candidate"
            raise InvalidRequest(message, param="candidates")


# what is shown


def _head(evaluation: Evaluation) -> dict[str, Any]:
    settled = evaluation.plan["settled"]
    num_cells, num_queries = len(settled["cells"]), len(settled["queries"])
    return {
        "id": evaluation.id,
        "object": "evaluation",
        "status": evaluation.status,
        "support_set": evaluation.support_set,
        "version": evaluation.version,
        "created_at": evaluation.created_at,
        "started_at": evaluation.started_at,
        "finished_at": evaluation.finished_at,
        "progress": {
            "cells": num_cells,
            "queries": num_cells * num_queries,
            "queries_done": min(evaluation.queries_done, num_cells * num_queries),
        },
        "error": evaluation.error,
    }


def _shown(evaluation: Evaluation) -> dict[str, Any]:
    settled, truths = evaluation.plan["settled"], evaluation.plan["truths"]
    head, cells = _head(evaluation), list(evaluation.cells.values())
    head["progress"]["cells_done"] = len(cells)
    always, rows = baseline(truths), summarise(cells)
    return {
        **head,
        "request": evaluation.plan["request"],
        "queries": len(settled["queries"]),
        "examples": evaluation.plan["num_examples"],
        "labels": [candidate["label"] for candidate in settled["candidates"]],
        "baseline": {"label": always.label, "accuracy": always.accuracy},
        "cells": cells,
        "summary": rows,
        "recommendation": recommend(rows, evaluation.support_set, evaluation.version, settled["order"], always),
    }
