"""POST /v1/score: log-probabilities of given continuations of a prompt, per token. The prompt is computed once."""

from __future__ import annotations

import math
import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse, read_request
from server.api.openapi import PROMPT, describe
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.errors import InvalidRequest
from server.fewshot.classification import score_prompts
from server.prompt import PreparedPrompt, check_texts, check_token_ids, continuation_ids, prepare_prompt
from server.request_record import RequestRecord
from server.schemas.fewshot import ScoreRequest
from server.schemas.responses.classification import Scores
from server.served_model import ServedModel

router = APIRouter()


@router.post("/v1/score", **describe("Completions", body=ScoreRequest, response=Scores, errors=PROMPT))
async def create_score(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Return the log-probabilities of given continuations of a prompt."""
    fields = await read_request(ScoreRequest, request, services)
    return JSONResponse(await unless_disconnected(request.receive, _score(fields, record, services)))


async def _score(fields: ScoreRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    model = services.model
    prompt = await prepare_prompt(fields.prompt, model, services.intake)
    candidate_ids = [
        await model.tokenize(_ids, candidate, index, prompt, model) for index, candidate in enumerate(fields.candidates)
    ]
    record.priority = fields.priority
    (scored,) = await score_prompts([prompt], candidate_ids, record, model, services.client)
    return {
        "id": f"score-{fields.request_id or record.request_id}",
        "object": "score",
        "created": int(time.time()),
        "model": model.name,
        "data": [
            {
                "index": index,
                "logprob": math.fsum(logprobs),
                "num_tokens": len(ids),
                "token_ids": ids,
                "tokens": [model.tokenizer.token(token_id) for token_id in ids],
                "token_logprobs": logprobs,
            }
            for index, (ids, logprobs) in enumerate(zip(candidate_ids, scored.logprobs, strict=True))
        ],
        "usage": record.usage(),
    }


def _ids(candidate: str | list[int], index: int, prompt: PreparedPrompt, model: ServedModel) -> list[int]:
    param = f"candidates[{index}]"
    if isinstance(candidate, str):
        check_texts([candidate], model, param)
        return continuation_ids(prompt.segments, candidate, model.tokenizer)
    if model.tokenizer.media_token_id in candidate:
        raise InvalidRequest("a candidate may not contain the media token", param=param)
    return check_token_ids(candidate, model, param)
