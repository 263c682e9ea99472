"""POST /v1/classify: which candidate answers the query, with probabilities; shots and templates as everywhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.admission import Ticket
from server.api.body import JSONResponse, read_body
from server.api.schemas import read
from server.api.schemas_classify import ClassifyRequest, candidates_of
from server.api.services import GivenServices, GivenTicket, Services
from server.api.sse import unless_disconnected
from server.engine.wire import FinishReason
from server.errors import InvalidRequest
from server.fewshot.candidates import Candidate, distinct
from server.fewshot.classification import Asking, Classification, Cost, Weighed, classify
from server.fewshot.prompting import Assembled, assemble

router = APIRouter()
logger = logging.getLogger(__name__)


@router.post("/v1/classify")
async def create_classification(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    accepted = time.monotonic()
    fields = read(ClassifyRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    asking = asking_of(request, services, ticket, fields.priority, accepted)
    return JSONResponse(await unless_disconnected(request.receive, _answer(fields, asking, services)))


def asking_of(request: Request, services: Services, ticket: Ticket, priority: int, accepted: float) -> Asking:
    request_id = request.state.request_id

    def ended(reason: FinishReason) -> None:
        seconds = time.monotonic() - accepted
        services.metrics.finished(reason)
        if reason == "stop":
            services.metrics.e2e_request_latency.observe(seconds)
        extra = {"request_id": request_id, "finish_reason": reason, "seconds": round(seconds, 4)}
        logger.info("request finished", extra=extra)

    return Asking(request_id=request_id, arrived=accepted, priority=priority, started=ticket.started, ended=ended)


async def _answer(fields: ClassifyRequest, asking: Asking, services: Services) -> dict[str, Any]:
    assembled = await assemble(fields, services)
    candidates = check_distinct(candidates_of(fields.candidates) or await _labels(fields, services))
    found = await classify(assembled, candidates, fields.weighing(), asking, services)
    ranked = found.ranked()
    return {
        "id": f"classify-{fields.request_id or asking.request_id}",
        "object": "classification",
        "created": int(time.time()),
        "model": services.model.name,
        "label": ranked[0].candidate.label,
        "confidence": ranked[0].probability,
        "candidates": [_shown(one) for one in ranked[: fields.top_k]],
        "fewshot": _fewshot(fields, assembled, found),
        "usage": usage(found.cost),
    }


async def _labels(fields: ClassifyRequest, services: Services) -> list[Candidate]:
    """Without candidates: the labels of the whole set that shots are taken from, or of the shots."""
    if fields.examples is not None:
        version = await services.support_sets.get_version(fields.examples.support_set, fields.examples.version)
        found = distinct(example.label or example.text for example in version.examples)
    else:
        found = distinct(shot.label or shot.text for shot in fields.shots)
    if not found:
        raise InvalidRequest("without shots or a support set there are no labels: give candidates", param="candidates")
    return found


def check_distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Neither two of one label nor two of one text: the answer could not tell them apart."""
    for name in ("label", "text"):
        seen: dict[str, int] = {}
        for place, one in enumerate(candidates):
            value = getattr(one, name)
            if (first := seen.setdefault(value, place)) != place:
                message = f"candidates {first} and {place} have the same {name}"
                raise InvalidRequest(message, param=f"candidates[{place}]")
    return list(candidates)


def _shown(one: Weighed) -> dict[str, Any]:
    return {
        **asdict(one.candidate),
        "logprob": one.logprob,
        "num_tokens": one.num_tokens,
        "probability": one.probability,
    }


def _fewshot(fields: ClassifyRequest, assembled: Assembled, found: Classification) -> dict[str, Any]:
    return {
        "shots": [asdict(used) for used in assembled.used],
        "template": assembled.template.name,
        "normalisation": fields.normalisation,
        "calibration": fields.calibration,
        "permutations": found.num_orders,
    }


def usage(cost: Cost) -> Mapping[str, Any]:
    """OpenAI's shape: nothing is generated; the tokens of candidates stand beside those of prompts."""
    return {
        "prompt_tokens": cost.prompt_tokens,
        "completion_tokens": 0,
        "total_tokens": cost.prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": cost.cached_tokens},
        "fewshot_details": {
            "prompts": cost.prompts,
            "candidate_tokens": cost.candidate_tokens,
            "media": cost.media,
            "media_encoded": cost.media_encoded,
            "media_cached": cost.media_cached,
            "media_deduplicated": cost.media_deduplicated,
        },
    }
