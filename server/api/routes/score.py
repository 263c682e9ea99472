"""POST /v1/score: log-probabilities of given continuations of a prompt, token by token. The prompt is computed once."""

from __future__ import annotations

import math
import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from model.prompt import PromptError, Segment, Text, encode
from model.tokenizer import PromptTokenizer
from server.api.body import JSONResponse, read_body
from server.api.prompts import known_ids, read_parts, read_prompt
from server.api.reply import asking_of
from server.api.routes.classify import usage
from server.api.services import GivenServices, GivenTicket
from server.api.sse import unless_disconnected
from server.asking import Asking
from server.errors import InvalidRequest
from server.fewshot.candidates import continuation_ids
from server.fewshot.classification import check_candidates, cost, score_all
from server.read_prompt import PreparedPrompt
from server.schemas.classify import ScoreRequest
from server.schemas.completions import Prompt, read
from server.services import Services

router = APIRouter()


@router.post("/v1/score")
async def create_score(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    accepted = time.monotonic()
    fields = read(ScoreRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    asking = asking_of(request, services, ticket, fields.priority, accepted)
    return JSONResponse(await unless_disconnected(request.receive, _answer(fields, asking, services)))


async def _answer(fields: ScoreRequest, asking: Asking, services: Services) -> dict[str, Any]:
    prompt, segments = await read_segments(fields.prompt, services)
    ids = [_ids(one, place, segments, services) for place, one in enumerate(fields.candidates)]
    check_candidates([prompt], ids, services.model.max_model_len)
    (scored,) = await score_all([prompt], ids, asking, services)
    token = services.model.tokenizer.token
    return {
        "id": f"score-{fields.request_id or asking.request_id}",
        "object": "score",
        "created": int(time.time()),
        "model": services.model.name,
        "data": [
            {
                "index": place,
                "logprob": math.fsum(logprobs),
                "num_tokens": len(tokens),
                "token_ids": tokens,
                "tokens": [token(token_id) for token_id in tokens],
                "token_logprobs": logprobs,
            }
            for place, (tokens, logprobs) in enumerate(zip(ids, scored.logprobs, strict=True))
        ],
        "usage": usage(cost([prompt], ids, [scored])),
    }


async def read_segments(prompt: Prompt, services: Services) -> tuple[PreparedPrompt, list[Segment] | None]:
    """The prompt, and its segments; None where the client has made it of token ids."""
    if isinstance(prompt, str):
        return await read_prompt(prompt, services.model, services.media), [Text(prompt)]
    parts = [part for part in prompt if not isinstance(part, int)]
    if len(parts) < len(prompt):
        return await read_prompt(prompt, services.model, services.media), None
    segments, media = await read_parts(parts, services.media, "prompt")
    try:
        return PreparedPrompt(encode(segments, services.model.tokenizer), media), segments
    except PromptError as error:
        raise InvalidRequest(str(error), param="prompt") from None


def continued_ids(segments: list[Segment] | None, text: str, tokenizer: PromptTokenizer) -> list[int]:
    """Ids of `text` behind a prompt of these segments, or behind one of token ids."""
    return tokenizer.encode_plain(text) if segments is None else continuation_ids(segments, text, tokenizer)


def _ids(candidate: str | list[int], place: int, segments: list[Segment] | None, services: Services) -> list[int]:
    model, param = services.model, f"candidates[{place}]"
    if isinstance(candidate, str):
        return continued_ids(segments, candidate, model.tokenizer)
    if model.tokenizer.media_token_id in candidate:
        raise InvalidRequest("a candidate shows no media of its own", param=param)
    return known_ids(candidate, model.num_token_ids, param)
