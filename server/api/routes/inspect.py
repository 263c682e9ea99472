"""POST /v1/inspect: what one token of a prompt, or of an answer to it, reads of its picture, and how far gates are open."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse, read_body
from server.api.reply import asking_of
from server.api.routes.score import continued_ids, read_segments
from server.api.services import GivenServices, GivenTicket
from server.api.sse import unless_disconnected
from server.asking import Asking, replied
from server.errors import ContextLengthExceeded, InvalidRequest
from server.read_prompt import PreparedPrompt
from server.schemas.base import Schema
from server.schemas.completions import Prompt, read
from server.services import Services
from server.wire import AttentionMap, Inspect, Inspected


class InspectRequest(Schema):
    """`token`: a position in prompt and answer; `layers`: gated ones, by the language-model layer behind each."""

    model: str | None = None
    prompt: Prompt
    answer: str = Field("", max_length=2**16)
    token: int | None = Field(None, ge=0, le=2**31 - 1)
    layers: list[Annotated[int, Field(ge=0)]] = Field([], max_length=256)
    request_id: str | None = Field(None, pattern=r"^[\w.:-]{1,128}$")
    user: str | None = Field(None, max_length=256)


router = APIRouter()


@router.post("/v1/inspect")
async def inspect(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    accepted = time.monotonic()
    fields = read(InspectRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    asking = asking_of(request, services, ticket, 0, accepted)
    return JSONResponse(await unless_disconnected(request.receive, _answer(fields, asking, services)))


async def _answer(fields: InspectRequest, asking: Asking, services: Services) -> dict[str, Any]:
    prompt, segments = await read_segments(fields.prompt, services)
    answer_ids = continued_ids(segments, fields.answer, services.model.tokenizer) if fields.answer else []
    _check_length(prompt.num_tokens, len(answer_ids), services.model.max_model_len)
    order = _order(fields, prompt, answer_ids, asking, services)
    found = await replied(asking, services.client.inspect(order, prompt.media))
    return {
        "id": f"inspect-{fields.request_id or asking.request_id}",
        "object": "inspection",
        "created": int(time.time()),
        "model": services.model.name,
        "tokens": [
            {"id": token_id, "text": services.model.tokenizer.token(token_id), "media": None if media < 0 else media}
            for token_id, media in zip(order.prompt.token_ids, order.prompt.media_index, strict=True)
        ],
        "num_prompt_tokens": prompt.num_tokens,
        "token": order.token,
        "gates": _gates(found),
        "attention": [_attention(one) for one in found.maps],
    }


def _order(
    fields: InspectRequest, prompt: PreparedPrompt, answer_ids: list[int], asking: Asking, services: Services
) -> Inspect:
    inspected = prompt.encoded.followed_by(answer_ids)
    length = len(inspected.token_ids)
    token = length - 1 if fields.token is None else fields.token
    if token >= length:
        raise InvalidRequest(f"token is {token}, prompt and answer have {length}", param="token")
    gated = services.model.config.gated_layers
    for place, layer in enumerate(fields.layers):
        if layer not in gated:
            message = f"layer {layer} has no gated layer in front, these have: {', '.join(map(str, gated))}"
            raise InvalidRequest(message, param=f"layers[{place}]")
    return Inspect(
        request_id=f"{asking.request_id}-{uuid.uuid4().hex[:8]}",
        prompt=inspected,
        token=token,
        layers=list(dict.fromkeys(fields.layers)),
    )


def _check_length(num_prompt_tokens: int, num_answer_tokens: int, max_model_len: int) -> None:
    if num_prompt_tokens + num_answer_tokens > max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt_tokens} tokens and the answer {num_answer_tokens}: "
            f"together more than the {max_model_len} that this model reads",
            param="answer" if num_prompt_tokens <= max_model_len else "prompt",
        )


def _gates(found: Inspected) -> list[dict[str, Any]]:
    return [
        {"layer": gate.layer, "attention": gate.attention, "feed_forward": gate.feed_forward} for gate in found.gates
    ]


def _attention(found: AttentionMap) -> dict[str, Any]:
    grid = np.frombuffer(found.data, np.float32).reshape(found.shape)
    return {"layers": found.layers, "visual_tokens": found.visual_tokens, "grid": grid.tolist()}
