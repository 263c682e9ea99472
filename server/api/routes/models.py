"""Routes of the served model: its description, its tokenizer, embeddings, and the attention of a token to its image.

Vectors of texts and of media are in different spaces of different widths, so a request for embeddings has only one kind.
"""

from __future__ import annotations

import asyncio
import base64
import time
from functools import partial
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from model.likeness import unit
from model.prompt import EncodedPrompt
from server.api.answer_text import token_text
from server.api.body import read_request
from server.api.chat_prompt import prepare_chat
from server.api.openapi import MEDIA, PROMPT, describe
from server.api.responses import JSONResponse, response_head
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, UnsupportedParameter
from server.prompt import (
    PreparedPrompt,
    PromptEnd,
    check_texts,
    check_token_ids,
    encode_text,
    prepare_prompt,
)
from server.schemas.models import DetokenizeRequest, EmbeddingsRequest, Inputs, InspectRequest, TokenizeRequest
from server.schemas.prompt import MediaPart, Part, TextPart
from server.schemas.responses.models import Embeddings, Inspection, Model, Models, Text, TokenizerInfo, Tokens
from server.served_model import ServedModel
from server.settings import Settings
from server.telemetry.request_record import RequestRecord
from server.wire import AttentionMap, Inspect

router = APIRouter()
STARTED = int(time.time())


@router.get("/v1/models", **describe("Model", response=Models))
async def list_models(services: GivenServices) -> Response:
    """List the served models."""
    cards = [_card(model, services.settings) for model in services.catalog.values()]
    return JSONResponse({"object": "list", "data": cards})


@router.get("/v1/models/{name:path}", **describe("Model", response=Model, errors=(ModelNotFound,)))
async def show_model(name: str, services: GivenServices) -> Response:
    """Describe a served model."""
    if (model := services.catalog.get(name)) is None:
        raise services.model_not_found(name)
    return JSONResponse(_card(model, services.settings))


def _card(model: ServedModel, settings: Settings) -> dict[str, Any]:
    config = model.config
    return {
        "id": model.name,
        "object": "model",
        "created": STARTED,
        "owned_by": "flamboyance",
        "root": config.name,
        "family": config.family,
        "max_model_len": model.max_model_len,
        "max_set_examples": settings.max_set_examples,
        "end_of_chunk": config.prompt.end_of_chunk or None,
        "sources": [msgspec.structs.asdict(part) for part in model.origin.parts],
        "vision": {
            "image_size": config.vision.image_size,
            "resize": config.vision.resize,
            "visual_tokens": config.resampler.num_latents,
            "max_media_per_request": settings.max_media_per_request,
        },
    }


@router.post(
    "/tokenize",
    **describe("Model", body=TokenizeRequest, response=Tokens, errors=(*MEDIA, ContextLengthExceeded)),
)
async def tokenize(request: Request, services: GivenServices) -> Response:
    """Convert a prompt or a conversation to the token ids that the model reads."""
    fields = await read_request(TokenizeRequest, request, services)
    encoded = await _encode(fields, services)
    body = {
        "tokens": encoded.token_ids,
        "media_index": encoded.media_index,
        "count": len(encoded.token_ids),
        "max_model_len": services.model.max_model_len,
    }
    if fields.return_token_strs:
        body["token_strs"] = await services.model.tokenize(_token_texts, encoded.token_ids, services.model)
    return JSONResponse(body)


def _token_texts(token_ids: list[int], model: ServedModel) -> list[str]:
    return [token_text(model.tokenizer, token_id) for token_id in token_ids]


def _encode_alone(text: str, model: ServedModel) -> EncodedPrompt:
    """Encode a text without markers. Raises `InvalidRequest`."""
    check_texts([text], model, "prompt")
    ids = model.tokenizer.encode_alone(text)
    return EncodedPrompt(token_ids=ids, media_index=[-1] * len(ids), media=[])


async def _encode(fields: TokenizeRequest, services: Services) -> EncodedPrompt:
    model, intake = services.model, services.intake
    if (fields.prompt is None) == (not fields.messages):
        raise InvalidRequest("send a prompt or messages, and not both", param="prompt")
    if fields.template is not None and not fields.messages:
        raise InvalidRequest("a template is for messages: a prompt has none", param="template")
    if not fields.add_special_tokens and not fields.messages:
        if not isinstance(fields.prompt, str):
            raise UnsupportedParameter(
                "add_special_tokens: false is accepted only for a text", param="add_special_tokens"
            )
        return await model.tokenize(_encode_alone, fields.prompt, model)
    if fields.prompt is not None:
        return (await prepare_prompt(fields.prompt, model, intake)).encoded
    prompt, _ = await prepare_chat(fields.messages, fields.template, model, intake)
    return prompt.encoded


@router.get("/tokenizer_info", **describe("Model", response=TokenizerInfo))
async def show_tokenizer(services: GivenServices) -> Response:
    """Describe the special tokens, in the format of lm-eval."""
    model = services.model
    prompt = model.config.prompt
    return JSONResponse(
        {
            "bos_token": prompt.begin or None,
            "eos_token": next((token for token in prompt.eos if token != prompt.end_of_chunk), None),
            "pad_token": None,
            "chat_template": None,
            "vocab_size": len(model.tokenizer),
            "model_max_length": model.max_model_len,
        }
    )


@router.post("/detokenize", **describe("Model", body=DetokenizeRequest, response=Text))
async def detokenize(request: Request, services: GivenServices) -> Response:
    """Convert token ids to text, including markers."""
    fields = await read_request(DetokenizeRequest, request, services)
    ids = check_token_ids(fields.tokens, services.model, "tokens")
    decode = partial(services.model.tokenizer.decode, ids, skip_special_tokens=False)
    return JSONResponse({"prompt": await services.model.tokenize(decode)})


@router.post("/v1/embeddings", **describe("Model", body=EmbeddingsRequest, response=Embeddings, errors=PROMPT))
async def create_embeddings(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Embed texts or media, but not both in one request."""
    fields = await read_request(EmbeddingsRequest, request, services)
    work = _embed(fields, record, services.with_salt(fields.cache_salt))
    return JSONResponse(await unless_disconnected(request.receive, work))


async def _embed(fields: EmbeddingsRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    parts = _media_parts(fields.input)
    if fields.media_vector == "likeness" and not parts:
        raise UnsupportedParameter("a text has no likeness", param="media_vector")
    if parts:
        media = list((await services.intake.read_all(parts, "input")).values())
        record.begin_prompt(0, [item.digest for item in media])
        embedding = services.engine.embed(media)
    else:
        texts = await _texts(fields.input, services.model)
        record.begin_prompt(sum(map(len, texts)))
        embedding = services.engine.embed_text(texts)
    with record:
        vectors = await embedding
        record.begun(record.prompt_tokens)
    if parts:
        vectors = await asyncio.to_thread(
            services.model.likeness if fields.media_vector == "likeness" else unit, vectors
        )
    if fields.encoding_format == "base64":
        embeddings = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    else:
        embeddings = vectors.tolist()
    data = [{"object": "embedding", "index": i, "embedding": embedding} for i, embedding in enumerate(embeddings)]
    return {"object": "list", "data": data, "model": services.model.name, "usage": record.usage()}


def _media_parts(inputs: Inputs) -> dict[str, MediaPart]:
    """Return media by their paths in the request, none if texts are to be embedded. Raises `InvalidRequest` for a mix."""
    if isinstance(inputs, str):
        return {}
    media = {f"input[{index}]": part for index, part in enumerate(inputs) if isinstance(part, MediaPart)}
    if media and len(media) < len(inputs):
        index = next(index for index in range(len(inputs)) if f"input[{index}]" not in media)
        message = "vectors of texts and of media are in different spaces: send texts and media in separate requests"
        raise InvalidRequest(message, param=f"input[{index}]")
    return media


async def _texts(inputs: Inputs, model: ServedModel) -> list[list[int]]:
    if isinstance(inputs, str):
        return [await model.tokenize(_ids, inputs, "input", model)]
    if token_ids := [item for item in inputs if isinstance(item, int)]:
        return [_ids(token_ids, "input", model)]
    texts = [item for item in inputs if not isinstance(item, int)]
    return [await model.tokenize(_ids, text, f"input[{index}]", model) for index, text in enumerate(texts)]


def _ids(text: str | list[int] | Part, param: str, model: ServedModel) -> list[int]:
    match text:
        case str():
            ids = encode_text(text, model, param)
        case TextPart():
            ids = encode_text(text.text, model, param)
        case list():
            ids = check_token_ids(text, model, param)
        case _:
            raise InvalidRequest("end_of_chunk cannot be embedded", param=param)
    if not ids:
        raise InvalidRequest("an empty text cannot be embedded", param=param)
    if len(ids) > model.max_model_len:
        message = f"the text has {len(ids)} tokens, more than the {model.max_model_len} that this model reads"
        raise ContextLengthExceeded(message, param=param)
    return ids


@router.post("/v1/inspect", **describe("Model", body=InspectRequest, response=Inspection, errors=PROMPT))
async def inspect(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Return where in its image a token attends, and the values of the gates."""
    fields = await read_request(InspectRequest, request, services)
    if (size := services.settings.tensor_parallel) > 1:
        raise UnsupportedParameter(f"attention cannot be inspected with tensor_parallel {size}")
    work = _inspect(fields, record, services.with_salt(fields.cache_salt))
    return JSONResponse(await unless_disconnected(request.receive, work))


async def _inspect(fields: InspectRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    model = services.model
    prompt = await prepare_prompt(fields.prompt, model, services.intake)
    tokens, token = await model.tokenize(_with_answer, fields, prompt, model)
    inspection = Inspect(
        request_id=record.begin_prompt(len(tokens.token_ids), tokens.media),
        prompt=tokens,
        token=token,
        layers=list(dict.fromkeys(fields.layers)),
        client=record.client,
    )
    with record:
        inspected = await services.engine.inspect(inspection, prompt.media)
        record.begun(record.prompt_tokens)
    return {
        **response_head("inspection", "inspect", fields, record, model),
        "tokens": [
            {"id": token_id, "text": token_text(model.tokenizer, token_id), "media": None if media < 0 else media}
            for token_id, media in zip(tokens.token_ids, tokens.media_index, strict=True)
        ],
        "num_prompt_tokens": prompt.num_tokens,
        "token": token,
        "gates": [msgspec.structs.asdict(gate) for gate in inspected.gates],
        "attention": [_attention(attention) for attention in inspected.maps],
        "usage": record.usage(),
    }


def _with_answer(fields: InspectRequest, prompt: PreparedPrompt, model: ServedModel) -> tuple[EncodedPrompt, int]:
    """Return the prompt with its answer, and the position of the token to inspect. Raises `InvalidRequest`."""
    check_texts([fields.answer], model, "answer")
    answer_ids = PromptEnd(prompt.segments, model.tokenizer).ids_after(fields.answer) if fields.answer else []
    prompt.check_room(len(answer_ids), "the answer", "answer", model)
    tokens = prompt.encoded.followed_by(answer_ids)
    num_tokens = len(tokens.token_ids)
    token = num_tokens - 1 if fields.token is None else fields.token
    if token >= num_tokens:
        raise InvalidRequest(f"token is {token}, prompt and answer have {num_tokens}", param="token")
    gated = model.config.gated_layers
    for index, layer in enumerate(fields.layers):
        if layer not in gated:
            message = f"layer {layer} does not follow a gated layer; accepted are {', '.join(map(str, gated))}"
            raise InvalidRequest(message, param=f"layers[{index}]")
    return tokens, token


def _attention(attention: AttentionMap) -> dict[str, Any]:
    grid = np.frombuffer(attention.data, np.float32).reshape(attention.shape)
    return {"layers": attention.layers, "visual_tokens": attention.visual_tokens, "grid": grid.tolist()}
