"""POST /v1/classify: which candidate answers the query, with probabilities; shots and templates as everywhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse, read_body
from server.api.reply import asking_of
from server.api.services import GivenServices, GivenTicket
from server.api.sse import unless_disconnected
from server.asking import Asking
from server.errors import InvalidRequest
from server.fewshot.candidates import Candidate, distinct
from server.fewshot.classification import Cost, Weighed, classify
from server.fewshot.prompting import Assembled, assemble
from server.schemas.classify import ClassifyRequest, candidates_of
from server.schemas.completions import read
from server.services import Services

# tokens left for candidates that are known only when the shots are
DEFAULT_ROOM = 32

router = APIRouter()


@router.post("/v1/classify")
async def create_classification(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    accepted = time.monotonic()
    fields = read(ClassifyRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    asking = asking_of(request, services, ticket, fields.priority, accepted)
    return JSONResponse(await unless_disconnected(request.receive, _answer(fields, asking, services)))


async def _answer(fields: ClassifyRequest, asking: Asking, services: Services) -> dict[str, Any]:
    given = check_distinct(candidates_of(fields.candidates))
    assembled = await assemble(fields, services, room=_room(given, services))
    candidates = given or check_distinct(_labels(fields, assembled))
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
        "fewshot": {
            **assembled.told(),
            "normalisation": fields.normalisation,
            "calibration": fields.calibration,
            "permutations": found.num_orders,
        },
        "usage": usage(found.cost, assembled.usage()),
    }


def _labels(fields: ClassifyRequest, assembled: Assembled) -> list[Candidate]:
    """Without candidates: the labels of the whole set that shots are taken from, or of the shots."""
    shown = fields.shots if assembled.support_set is None else assembled.support_set.examples
    found = distinct(one.label or one.text for one in shown)
    if not found:
        raise InvalidRequest("without shots or a support set there are no labels: give candidates", param="candidates")
    return found


def _room(candidates: Sequence[Candidate], services: Services) -> int:
    """Tokens that the longest candidate may take behind a prompt whose first shots are left out where there is no room."""
    encode = services.model.tokenizer.encode_plain
    return max((len(encode(one.text)) + 1 for one in candidates), default=DEFAULT_ROOM)


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


def usage(cost: Cost, details: Mapping[str, Any] | None = None) -> dict[str, Any]:
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
            **(details or {}),
        },
    }
