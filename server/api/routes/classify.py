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
from server.fewshot.classification import Classification as WeighedCandidates
from server.fewshot.classification import classify, read_candidates
from server.fewshot.prompting import assemble
from server.prompt import encode_text
from server.request_record import RequestRecord
from server.schemas.fewshot import ClassifyRequest
from server.schemas.responses.classification import Classification
from server.served_model import ServedModel

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
    candidates, model = read_candidates(fields.candidates), services.model
    texts = {f"candidates[{index}]": candidate.text for index, candidate in enumerate(candidates)}
    token_ids = [await model.tokenize(encode_text, text, model, param) for param, text in texts.items()]
    room = max((len(ids) + 1 for ids in token_ids), default=DEFAULT_ROOM)
    assembled = await assemble(fields, model, services.shots, room=room)
    record.priority = fields.priority
    report = assembled.report(record)
    if not candidates:
        # the labels of the whole support set that shots are taken from, or of the given shots
        examples = fields.shots if assembled.support_set is None else assembled.support_set.examples
        labels = dict.fromkeys(example.label or example.text for example in examples)
        candidates = read_candidates(filter(None, labels))
    if not candidates:
        raise InvalidRequest("without shots or a support set there are no labels: give candidates", param="candidates")
    result = await classify(assembled, candidates, fields, record, model, services.client)
    return _answer(result, report, fields, record, model)


def _answer(
    result: WeighedCandidates,
    report: dict[str, Any],
    fields: ClassifyRequest,
    record: RequestRecord,
    model: ServedModel,
) -> dict[str, Any]:
    ranked = result.ranked()
    return {
        "id": f"classify-{fields.request_id or record.request_id}",
        "object": "classification",
        "created": int(time.time()),
        "model": model.name,
        "label": ranked[0].label,
        "confidence": ranked[0].probability,
        "candidates": [asdict(candidate) for candidate in ranked[: fields.top_k]],
        "fewshot": {
            **report,
            "normalisation": fields.normalisation,
            "calibration": fields.calibration,
            "permutations": result.num_orders,
        },
        "usage": record.usage(),
    }
