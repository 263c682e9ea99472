"""Routes of leave-one-out evaluations of support sets: create, list, show, cancel and delete them."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import read_query, read_request
from server.api.openapi import SUPPORT_SET_ERRORS, describe
from server.api.responses import JSONResponse
from server.api.services import GivenServices
from server.errors import DatabaseUnavailable, EvaluationNotFound
from server.fewshot.comparison import obstacle_of
from server.quality.controls import judge_controls
from server.quality.evaluation import make_plan
from server.quality.evaluation_records import Evaluation, EvaluationHead
from server.quality.learning_curve import report_curve
from server.quality.recommendation import baseline, explain, summarise
from server.quality.recommendations import lacks_likeness, recommendation_of, unjudged_labels
from server.schemas.base import list_page
from server.schemas.responses.base import Deleted
from server.schemas.responses.evaluations import EvaluationHeads, EvaluationReport
from server.schemas.stored import EvaluateRequest, ListEvaluationsRequest
from server.store.examples import answer_of
from server.store.staging import ID_PREFIX

router = APIRouter()

EVALUATION = (EvaluationNotFound, DatabaseUnavailable)


@router.post(
    "/v1/support_sets/{support_set}/evaluate",
    **describe(
        "Evaluations",
        body=EvaluateRequest,
        is_body_required=False,
        response=EvaluationReport,
        errors=SUPPORT_SET_ERRORS,
        statuses=(202,),
    ),
)
async def create_evaluation(support_set: str, request: Request, services: GivenServices) -> Response:
    """Start a leave-one-out evaluation of a support set."""
    client = request.state.ticket.client
    services.evaluations.check_room(client)
    fields = await read_request(EvaluateRequest, request, services, empty=b"{}")
    version = await services.support_sets.get_version(support_set, fields.version)
    plan = make_plan(fields, version, services.model, services.settings.max_media_per_request)
    answers = {example.id: answer_of(example) for example in version.examples}
    stored = {
        "request": fields.model_dump(mode="json", exclude_unset=True),
        "settled": msgspec.to_builtins(plan),
        "truths": [answers[example_id] for example_id in plan.queries],
        "num_examples": len(version.examples),
        "prior": services.model.prior.method(len(version.examples) / len(plan.candidates), plan.methods),
        "comparable": obstacle_of(version.examples, plan.candidates) is None,
        "single": [label for label, indices in version.examples.by_answer.items() if len(indices) == 1],
    }
    return JSONResponse(_card(await services.evaluations.create(version.id, version.version, stored, client)), 202)


@router.get(
    "/v1/evaluations",
    **describe("Evaluations", query=ListEvaluationsRequest, response=EvaluationHeads, errors=SUPPORT_SET_ERRORS),
)
async def list_evaluations(request: Request, services: GivenServices) -> Response:
    """List evaluations without their results, the oldest first."""
    fields = read_query(ListEvaluationsRequest, request)
    set_id = fields.support_set
    # evaluations outlive their set; only its id is left then
    if set_id is not None and not set_id.startswith(ID_PREFIX):
        set_id = (await services.support_sets.get(set_id)).id
    page = await services.evaluations.page(set_id, fields.after, fields.limit + 1)
    return JSONResponse(list_page([_head(evaluation) for evaluation in page], fields.limit))


@router.get("/v1/evaluations/{evaluation_id}", **describe("Evaluations", response=EvaluationReport, errors=EVALUATION))
async def show_evaluation(evaluation_id: str, services: GivenServices) -> Response:
    """Return an evaluation with its results so far."""
    return JSONResponse(_card(await services.evaluations.get(evaluation_id)))


@router.post(
    "/v1/evaluations/{evaluation_id}/cancel", **describe("Evaluations", response=EvaluationReport, errors=EVALUATION)
)
async def cancel_evaluation(evaluation_id: str, services: GivenServices) -> Response:
    """Cancel an evaluation and keep its results so far."""
    return JSONResponse(_card(await services.evaluations.cancel(evaluation_id)))


@router.delete("/v1/evaluations/{evaluation_id}", **describe("Evaluations", response=Deleted, errors=EVALUATION))
async def delete_evaluation(evaluation_id: str, services: GivenServices) -> Response:
    """Delete an evaluation, even while it runs."""
    await services.evaluations.delete(evaluation_id)
    return JSONResponse({"id": evaluation_id, "object": "evaluation", "deleted": True})


def _head(evaluation: EvaluationHead) -> dict[str, Any]:
    num_queries = evaluation.num_cells * evaluation.num_queries
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
            "cells": evaluation.num_cells,
            "queries": num_queries,
            "queries_done": min(evaluation.queries_done, num_queries),
            "seconds_left": evaluation.seconds_left if evaluation.status == "running" else None,
        },
        "error": evaluation.error,
    }


def _card(evaluation: Evaluation) -> dict[str, Any]:
    plan, answers = evaluation.plan["settled"], evaluation.plan["truths"]
    head, cells = _head(evaluation), list(evaluation.cells.values())
    head["progress"]["cells_done"] = len(cells)
    commonest, rows = baseline(answers), summarise(cells)
    recommendation, without_controls = recommendation_of(evaluation), [row for row in rows if row["control"] is None]
    method = None if recommendation is None else recommendation["request"]["method"]
    unjudged = unjudged_labels(evaluation)
    reasons = explain(without_controls, commonest, unjudged, lacks_likeness=lacks_likeness(evaluation))
    notes = [reasons, *judge_controls(rows, cells)]
    return {
        **head,
        "request": evaluation.plan["request"],
        "queries": len(plan["queries"]),
        "left_out": plan["queries"],
        "examples": evaluation.plan["num_examples"],
        "labels": [candidate["label"] for candidate in plan["candidates"]],
        "baseline": {"label": commonest.label, "accuracy": commonest.accuracy},
        "cells": cells,
        "summary": rows,
        "recommendation": recommendation,
        "learning_curve": report_curve(cells, method),
        "note": " ".join(filter(None, notes)) or None,
    }
