"""POST /v1/embeddings in OpenAI's shape: texts by the frozen language model, images and videos by the frozen encoder.

The two are different spaces of different widths, so a request is of one kind.
"""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import JSONResponse, read_body
from server.api.prompts import known_ids
from server.api.reply import asking_of
from server.api.services import GivenServices, GivenTicket
from server.api.sse import unless_disconnected
from server.asking import Asking, replied
from server.errors import ContextLengthExceeded, InvalidRequest
from server.schemas.base import Schema
from server.schemas.completions import EndOfChunkPart, Part, TextPart, read
from server.schemas.media import MediaPart
from server.services import Services

MAX_INPUTS = 2048

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _input_tag(value: Any) -> str:
    """One text, as a string or as token ids; or several of one sort, by the first of them."""
    if isinstance(value, str):
        return "<string>"
    first = value[0] if isinstance(value, list) and value else None
    kinds = {str: "<strings>", int: "<token ids>", list: "<lists of token ids>"}
    return kinds.get(type(first), "<parts>")


Inputs = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[str], Field(max_length=MAX_INPUTS), Tag("<strings>")]
    | Annotated[TokenIds, Tag("<token ids>")]
    | Annotated[list[TokenIds], Field(max_length=MAX_INPUTS), Tag("<lists of token ids>")]
    | Annotated[list[Part], Field(min_length=1, max_length=MAX_INPUTS), Tag("<parts>")],
    Discriminator(_input_tag),
]


class EmbeddingsRequest(Schema):
    model: str | None = None
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = Field(None, max_length=256)


router = APIRouter()


@router.post("/v1/embeddings")
async def create_embeddings(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    accepted = time.monotonic()
    fields = read(EmbeddingsRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    asking = asking_of(request, services, ticket, 0, accepted)
    return JSONResponse(await unless_disconnected(request.receive, _answer(fields, asking, services)))


async def _answer(fields: EmbeddingsRequest, asking: Asking, services: Services) -> dict[str, Any]:
    media = _media(fields.input)
    num_tokens = 0
    if media:
        found = list((await services.media.read_all(media, "input")).values())
        vectors = await replied(asking, services.client.embed(found))
    else:
        texts = _texts(fields.input, services)
        num_tokens = sum(map(len, texts))
        vectors = await replied(asking, services.client.embed_text(texts))
        services.metrics.prompt_tokens.inc(num_tokens)
    encode = _base64 if fields.encoding_format == "base64" else _floats
    data = [{"object": "embedding", "index": i, "embedding": encode(row)} for i, row in enumerate(vectors)]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "fewshot_details": {"media": len(media)}}
    return {"object": "list", "data": data, "model": services.model.name, "usage": usage}


def _media(inputs: str | list[str] | list[int] | list[list[int]] | list[Part]) -> dict[str, MediaPart]:
    """Media by their places; none where texts are embedded."""
    if isinstance(inputs, str):
        return {}
    media = {f"input[{place}]": part for place, part in enumerate(inputs) if isinstance(part, MediaPart)}
    if media and len(media) < len(inputs):
        place = next(place for place in range(len(inputs)) if f"input[{place}]" not in media)
        message = "texts and media have vectors of different spaces: send them in requests of their own"
        raise InvalidRequest(message, param=f"input[{place}]")
    return media


def _texts(inputs: str | list[str] | list[int] | list[list[int]] | list[Part], services: Services) -> list[list[int]]:
    if isinstance(inputs, str):
        return [_ids(inputs, "input", services)]
    token_ids = [one for one in inputs if isinstance(one, int)]
    if token_ids:
        return [_ids(token_ids, "input", services)]
    return [_ids(_text(one, place), f"input[{place}]", services) for place, one in enumerate(inputs)]


def _text(one: str | int | list[int] | Part, place: int) -> str | list[int]:
    if isinstance(one, str | list):
        return one
    if isinstance(one, TextPart):
        return one.text
    assert isinstance(one, EndOfChunkPart)
    raise InvalidRequest("the end of a chunk has no vector", param=f"input[{place}]")


def _ids(text: str | list[int], param: str, services: Services) -> list[int]:
    model = services.model
    ids = model.tokenizer.encode_plain(text) if isinstance(text, str) else known_ids(text, model.num_token_ids, param)
    if not ids:
        raise InvalidRequest("an empty text has no vector", param=param)
    if len(ids) > model.max_model_len:
        raise ContextLengthExceeded(
            f"a text of {len(ids)} tokens, more than the {model.max_model_len} that this model reads", param=param
        )
    return ids


def _floats(vector: NDArray[np.float32]) -> list[float]:
    values: list[float] = vector.tolist()
    return values


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
