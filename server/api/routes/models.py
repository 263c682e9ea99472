"""Routes of the served model and its tokenizer: `/v1/models`, `/tokenize`, `/detokenize`."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.answer_text import token_text
from server.api.body import JSONResponse, read_request
from server.api.chat_prompt import prepare_chat
from server.api.openapi import MEDIA, describe
from server.api.services import GivenServices, Services
from server.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from server.prompt import PreparedPrompt, check_token_ids, prepare_prompt
from server.schemas.models import DetokenizeRequest, TokenizeRequest
from server.schemas.responses.models import Model, Models, Text, Tokens

router = APIRouter()
STARTED = int(time.time())


@router.get("/v1/models", **describe("Model", response=Models))
async def list_models(services: GivenServices) -> Response:
    """List the served model."""
    return JSONResponse({"object": "list", "data": [_card(services)]})


@router.get("/v1/models/{name:path}", **describe("Model", response=Model, errors=(ModelNotFound,)))
async def show_model(name: str, services: GivenServices) -> Response:
    """Describe the served model."""
    if name != services.model.name:
        raise services.model_not_found(name)
    return JSONResponse(_card(services))


def _card(services: Services) -> dict[str, Any]:
    model, config = services.model, services.model.config
    return {
        "id": model.name,
        "object": "model",
        "created": STARTED,
        "owned_by": "flamboyance",
        "root": config.name,
        "family": config.family,
        "max_model_len": model.max_model_len,
        "vision": {
            "image_size": config.vision.image_size,
            "visual_tokens": config.resampler.num_latents,
            "max_media_per_request": services.settings.max_media_per_request,
        },
    }


@router.post(
    "/tokenize",
    **describe("Model", body=TokenizeRequest, response=Tokens, errors=(*MEDIA, ContextLengthExceeded)),
)
async def tokenize(request: Request, services: GivenServices) -> Response:
    """Return the ids of a prompt as the model reads it, family markers included."""
    fields = await read_request(TokenizeRequest, request, services)
    encoded = (await _prepare(fields, services)).encoded
    body = {
        "tokens": encoded.token_ids,
        "media_index": encoded.media_index,
        "count": len(encoded.token_ids),
        "max_model_len": services.model.max_model_len,
    }
    if fields.return_token_strs:
        body["token_strs"] = [token_text(services.model.tokenizer, token_id) for token_id in encoded.token_ids]
    return JSONResponse(body)


async def _prepare(fields: TokenizeRequest, services: Services) -> PreparedPrompt:
    if (fields.prompt is None) == (not fields.messages):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if fields.prompt is not None:
        return await prepare_prompt(fields.prompt, services.model, services.intake)
    prompt, _ = await prepare_chat(fields.messages, fields.template, services.model, services.intake)
    return prompt


@router.post("/detokenize", **describe("Model", body=DetokenizeRequest, response=Text))
async def detokenize(request: Request, services: GivenServices) -> Response:
    """Return token ids as text, markers included."""
    fields = await read_request(DetokenizeRequest, request, services)
    ids = check_token_ids(fields.tokens, services.model, "tokens")
    return JSONResponse({"prompt": services.model.tokenizer.decode(ids, skip_special_tokens=False)})
