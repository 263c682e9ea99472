"""POST /v1/classify: the probabilities of candidates as the answer to a query, with shots and templates."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse, read_request
from server.api.openapi import PROMPT, SUPPORT_SET, describe
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.errors import InvalidRequest
from server.fewshot.classification import (
    Candidate,
    WeighedCandidate,
    check_distinct,
    classify,
    label_candidates,
    read_candidates,
)
from server.fewshot.prompting import AssembledPrompt, assemble
from server.request_record import RequestRecord
from server.schemas.fewshot import ClassifyRequest
from server.schemas.responses.classification import Classification

# tokens left for candidates that are known only once the shots are
DEFAULT_ROOM = 32

router = APIRouter()


@router.post(
    "/v1/classify",
    **describe("Few-shot", body=ClassifyRequest, response=Classification, errors=(*PROMPT, *SUPPORT_SET)),
)
async def create_classification(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Return which of the candidates answers a few-shot query, with probabilities."""
    fields = await read_request(ClassifyRequest, request, services)
    return JSONResponse(await unless_disconnected(request.receive, _classify(fields, record, services)))


async def _classify(fields: ClassifyRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    candidates = read_candidates(fields.candidates)
    assembled = await assemble(fields, services.model, services.shots, room=_room(candidates, services))
    record.priority = fields.priority
    record.num_shots = len(assembled.shots)
    record.details |= assembled.usage()
    candidates = candidates or check_distinct(_labels(fields, assembled))
    result = await classify(assembled, candidates, fields.weighing(), record, services.model, services.client)
    ranked = result.ranked()
    return {
        "id": f"classify-{fields.request_id or record.request_id}",
        "object": "classification",
        "created": int(time.time()),
        "model": services.model.name,
        "label": ranked[0].candidate.label,
        "confidence": ranked[0].probability,
        "candidates": [_report(candidate) for candidate in ranked[: fields.top_k]],
        "fewshot": {
            **assembled.report(),
            "normalisation": fields.normalisation,
            "calibration": fields.calibration,
            "permutations": result.num_orders,
        },
        "usage": record.usage(),
    }


def _labels(fields: ClassifyRequest, assembled: AssembledPrompt) -> list[Candidate]:
    """Return the labels of the whole support set that shots are taken from, or of the given shots."""
    examples = fields.shots if assembled.support_set is None else assembled.support_set.examples
    candidates = label_candidates(example.label or example.text for example in examples)
    if not candidates:
        raise InvalidRequest("without shots or a support set there are no labels: give candidates", param="candidates")
    return candidates


def _room(candidates: list[Candidate], services: Services) -> int:
    """Return the tokens that the longest candidate may take after a prompt with `truncate_shots`."""
    encode = services.model.tokenizer.encode_plain
    return max((len(encode(candidate.text)) + 1 for candidate in candidates), default=DEFAULT_ROOM)


def _report(weighed: WeighedCandidate) -> dict[str, Any]:
    return {
        **asdict(weighed.candidate),
        "logprob": weighed.logprob,
        "num_tokens": weighed.num_tokens,
        "probability": weighed.probability,
    }
