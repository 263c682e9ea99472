"""POST /v1/embeddings in OpenAI's shape: texts by the frozen language model, images and videos by the frozen encoder.

The two are different spaces of different widths, so a request is of one kind.
"""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse, read_request
from server.api.openapi import PROMPT, describe
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.errors import ContextLengthExceeded, InvalidRequest
from server.prompt import check_token_ids, encode_text
from server.request_record import RequestRecord
from server.schemas.models import EmbeddingsRequest, Inputs
from server.schemas.prompt import MediaPart, Part, TextPart
from server.schemas.responses.classification import Embeddings
from server.served_model import ServedModel

router = APIRouter()


@router.post("/v1/embeddings", **describe("Model", body=EmbeddingsRequest, response=Embeddings, errors=PROMPT))
async def create_embeddings(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Return the vectors of texts or of media, never of both in one request."""
    fields = await read_request(EmbeddingsRequest, request, services)
    return JSONResponse(await unless_disconnected(request.receive, _embed(fields, record, services)))


async def _embed(fields: EmbeddingsRequest, record: RequestRecord, services: Services) -> dict[str, Any]:
    parts = _media_parts(fields.input)
    if parts:
        media = list((await services.intake.read_all(parts, "input")).values())
        record.add_prompt(0, [item.digest for item in media])
        embedding = services.client.embed(media)
    else:
        texts = await _texts(fields.input, services.model)
        record.add_prompt(sum(map(len, texts)))
        embedding = services.client.embed_text(texts)
    with record:
        vectors = await embedding
        record.answered(record.prompt_tokens)
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
        message = "texts and media have vectors of different spaces: send them in requests of their own"
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
            raise InvalidRequest("the end of a chunk has no vector", param=param)
    if not ids:
        raise InvalidRequest("an empty text has no vector", param=param)
    if len(ids) > model.max_model_len:
        message = f"the text has {len(ids)} tokens, more than the {model.max_model_len} that this model reads"
        raise ContextLengthExceeded(message, param=param)
    return ids
