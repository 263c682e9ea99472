"""POST /v1/completions in OpenAI's shape, for prompts that may hold media.

The route reads as its steps: read, check, order, answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.admission import Ticket
from server.api.answers import Beside, CompletionShape, Wanted, make_order, respond
from server.api.body import read_body
from server.api.prompts import read_prompt
from server.api.services import GivenServices, GivenTicket
from server.read_prompt import PreparedPrompt
from server.schemas.completions import CompletionFields, CompletionRequest, read
from server.services import Services

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    accepted = time.monotonic()
    fields = read(CompletionRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    prompt = await read_prompt(fields.prompt, services.model, services.media)
    return await complete(request, services, ticket, fields, Ordered(prompt=prompt, accepted=accepted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordered:
    """What a route has made of a request. `lead` and `details` are those of `Order`; `told` stands beside the choices."""

    prompt: PreparedPrompt
    accepted: float
    lead: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)


async def complete(
    request: Request, services: Services, ticket: Ticket, fields: CompletionFields, ordered: Ordered
) -> Response:
    """A prompt's completion, whoever wrote the prompt."""
    request_id = request.state.request_id
    order = make_order(fields, _wanted(fields, ordered), ordered.prompt, services, request_id, ordered.accepted)
    beside = Beside(
        model=services.model,
        prompt=ordered.prompt,
        prompt_logprobs=fields.prompt_logprobs is not None,
        token_ids=fields.return_token_ids,
    )
    shape = CompletionShape(fields.request_id or request_id, beside, logprobs=fields.logprobs is not None)
    return await respond(request, services, ticket, fields, order, shape, ordered.told)


def _wanted(fields: CompletionFields, ordered: Ordered) -> Wanted:
    return Wanted(
        max_tokens=fields.max_tokens,
        is_default="max_tokens" not in fields.model_fields_set,
        logprobs=fields.logprobs,
        prompt_logprobs=_num_prompt_logprobs(fields),
        echo=fields.echo,
        lead=ordered.lead,
        details=ordered.details,
    )


def _num_prompt_logprobs(fields: CompletionFields) -> int | None:
    """SimilarityQuery for by itself, or because the echoed prompt shows its log-probabilities too."""
    asked = [fields.prompt_logprobs, fields.logprobs if fields.echo else None]
    return max((count for count in asked if count is not None), default=None)
