"""POST /v1/embeddings in OpenAI's shape: texts by the frozen language model, images and videos by the frozen encoder.

The two are different spaces of different widths, so a request is of one kind.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse, read_request
from server.api.openapi import PROMPT, describe
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.errors import ContextLengthExceeded, InvalidRequest
from server.prompt import check_token_ids
from server.request_record import RequestRecord
from server.schemas.models import EmbeddingsRequest, Inputs
from server.schemas.prompt import EndOfChunkPart, MediaPart, Part, TextPart
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
        texts = _texts(fields.input, services.model)
        record.add_prompt(sum(map(len, texts)))
        embedding = services.client.embed_text(texts)
    with record:
        vectors = await embedding
        record.answered(record.prompt_tokens)
    encode = _base64 if fields.encoding_format == "base64" else _floats
    data = [{"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in enumerate(vectors)]
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


def _texts(inputs: Inputs, model: ServedModel) -> list[list[int]]:
    if isinstance(inputs, str):
        return [_ids(inputs, "input", model)]
    token_ids = [item for item in inputs if isinstance(item, int)]
    if token_ids:
        return [_ids(token_ids, "input", model)]
    return [_ids(_text(item, index), f"input[{index}]", model) for index, item in enumerate(inputs)]


def _text(item: str | int | list[int] | Part, index: int) -> str | list[int]:
    if isinstance(item, str | list):
        return item
    if isinstance(item, TextPart):
        return item.text
    assert isinstance(item, EndOfChunkPart)
    raise InvalidRequest("the end of a chunk has no vector", param=f"input[{index}]")


def _ids(text: str | list[int], param: str, model: ServedModel) -> list[int]:
    text = model.tokenizer.encode_plain(text) if isinstance(text, str) else text
    ids = check_token_ids(text, model, param)
    if not ids:
        raise InvalidRequest("an empty text has no vector", param=param)
    if len(ids) > model.max_model_len:
        message = f"the text has {len(ids)} tokens, more than the {model.max_model_len} that this model reads"
        raise ContextLengthExceeded(message, param=param)
    return ids


def _floats(vector: NDArray[np.float32]) -> list[float]:
    values: list[float] = vector.tolist()
    return values


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
