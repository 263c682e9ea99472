"""POST /v1/completions in OpenAI's shape, for prompts that may hold media.

The route reads as its steps: read, check, order, answer.
"""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.answers import Beside, CompletionShape, Wanted, make_order, respond
from server.api.body import read_body
from server.api.prompts import read_prompt
from server.api.schemas import CompletionRequest, read
from server.api.services import GivenServices, GivenTicket

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    accepted, request_id = time.monotonic(), request.state.request_id
    fields = read(CompletionRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    prompt = await read_prompt(fields.prompt, services.model, services.media)
    order = make_order(fields, _wanted(fields), prompt, services, request_id, accepted)
    beside = Beside(
        model=services.model,
        prompt=prompt,
        prompt_logprobs=fields.prompt_logprobs is not None,
        token_ids=fields.return_token_ids,
    )
    shape = CompletionShape(fields.request_id or request_id, beside, logprobs=fields.logprobs is not None)
    return await respond(request, services, ticket, fields, order, shape)


def _wanted(fields: CompletionRequest) -> Wanted:
    return Wanted(
        max_tokens=fields.max_tokens,
        is_default="max_tokens" not in fields.model_fields_set,
        logprobs=fields.logprobs,
        prompt_logprobs=_num_prompt_logprobs(fields),
        echo=fields.echo,
    )


def _num_prompt_logprobs(fields: CompletionRequest) -> int | None:
    """Asked for by itself, or because the echoed prompt shows its log-probabilities too."""
    asked = [fields.prompt_logprobs, fields.logprobs if fields.echo else None]
    return max((count for count in asked if count is not None), default=None)
