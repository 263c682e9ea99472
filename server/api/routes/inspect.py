"""POST /v1/inspect: what one token of a prompt or its answer reads of its image, and how far the gates are open."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse, read_request
from server.api.openapi import PROMPT, describe
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.errors import InvalidRequest
from server.prompt import PreparedPrompt, check_length, check_texts, continuation_ids, prepare_prompt
from server.request_record import RequestRecord
from server.schemas.models import InspectRequest
from server.schemas.responses.models import Inspection
from server.served_model import ServedModel
from server.wire import AttentionMap, Inspect

router = APIRouter()


@router.post("/v1/inspect", **describe("Model", body=InspectRequest, response=Inspection, errors=PROMPT))
async def inspect(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Return what a token reads of its image, and how far the gates are open."""
    fields = await read_request(InspectRequest, request, services)
    return JSONResponse(await unless_disconnected(request.receive, _inspect(fields, record, services)))


async def _inspect(fields: InspectRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    model = services.model
    prompt = await prepare_prompt(fields.prompt, model, services.intake)
    inspection = await model.tokenize(_inspection, fields, prompt, record, model)
    tokens = inspection.prompt
    record.add_prompt(len(tokens.token_ids), tokens.media)
    with record:
        inspected = await services.client.inspect(inspection, prompt.media)
        record.answered(record.prompt_tokens)
    return {
        "id": f"inspect-{fields.request_id or record.request_id}",
        "object": "inspection",
        "created": int(time.time()),
        "model": model.name,
        "tokens": [
            {"id": token_id, "text": model.tokenizer.token(token_id), "media": None if media < 0 else media}
            for token_id, media in zip(tokens.token_ids, tokens.media_index, strict=True)
        ],
        "num_prompt_tokens": prompt.num_tokens,
        "token": inspection.token,
        "gates": [msgspec.structs.asdict(gate) for gate in inspected.gates],
        "attention": [_attention(attention) for attention in inspected.maps],
        "usage": record.usage(),
    }


def _inspection(fields: InspectRequest, prompt: PreparedPrompt, record: RequestRecord, model: ServedModel) -> Inspect:
    """Return the request to the engine. Raises `InvalidRequest`."""
    check_texts([fields.answer], model, "answer")
    answer_ids = continuation_ids(prompt.segments, fields.answer, model.tokenizer) if fields.answer else []
    check_length(prompt.num_tokens, len(answer_ids), "the answer", "answer", model.max_model_len)
    tokens = prompt.encoded.followed_by(answer_ids)
    num_tokens = len(tokens.token_ids)
    token = num_tokens - 1 if fields.token is None else fields.token
    if token >= num_tokens:
        raise InvalidRequest(f"token is {token}, prompt and answer have {num_tokens}", param="token")
    gated = model.config.gated_layers
    for index, layer in enumerate(fields.layers):
        if layer not in gated:
            message = f"layer {layer} follows no gated layer, these do: {', '.join(map(str, gated))}"
            raise InvalidRequest(message, param=f"layers[{index}]")
    return Inspect(
        request_id=record.new_engine_id(), prompt=tokens, token=token, layers=list(dict.fromkeys(fields.layers))
    )


def _attention(attention: AttentionMap) -> dict[str, Any]:
    grid = np.frombuffer(attention.data, np.float32).reshape(attention.shape)
    return {"layers": attention.layers, "visual_tokens": attention.visual_tokens, "grid": grid.tolist()}
