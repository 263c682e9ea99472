"""From a read prompt to a response: the one path of every route that generates, in the shape that the route gives it.

A `Shape` knows how an answer looks, whole and in pieces, and nothing of how text is made.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from server.admission import Ticket
from server.api.answer_text import Order, Piece
from server.api.body import JSONResponse
from server.api.generation import Generation
from server.api.logprobs import completion_logprobs, prompt_logprobs
from server.api.prompts import check_length
from server.api.sampling import sampling
from server.api.sse import EventStream, unless_disconnected
from server.read_prompt import PreparedPrompt
from server.schemas.completions import GenerationFields, StreamOptions
from server.served_model import ServedModel
from server.services import Services
from server.wire import Generate


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What routes call by different names: the length, and what is shown beside the text (see `Order`)."""

    max_tokens: int
    # a default is cut to the room there is, a number that was asked for is not
    is_default: bool
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    lead: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class Shape(Protocol):
    """How a route's answer looks."""

    def head(self, *, is_stream: bool) -> dict[str, Any]:
        """What stands around the choices, in each chunk of a stream too."""
        ...

    def choice(self, whole: Piece, generation: Generation) -> dict[str, Any]: ...

    def deltas(self, piece: Piece, generation: Generation, *, is_first: bool) -> Iterator[dict[str, Any]]:
        """One piece as the choices of one or more chunks; `is_first` of its answer."""
        ...


def make_order(
    fields: GenerationFields,
    wanted: Wanted,
    prompt: PreparedPrompt,
    services: Services,
    request_id: str,
    accepted: float,
) -> Order:
    """Raises `InvalidRequest` for what cannot be ordered. `accepted`: when the request came, by the monotonic clock."""
    model = services.model
    room = max(0, model.max_model_len - prompt.num_tokens)
    max_tokens = min(wanted.max_tokens, room) if wanted.is_default else wanted.max_tokens
    check_length(prompt, max_tokens, model.max_model_len)
    request = Generate(
        # a client may use its id twice, the engine must not
        request_id=f"{request_id}-{uuid.uuid4().hex[:8]}",
        prompt=prompt.encoded,
        sampling=sampling(fields, max_tokens, model.num_token_ids, wanted.logprobs, wanted.prompt_logprobs),
        priority=fields.priority,
        arrived=accepted,
    )
    return Order(
        request=request,
        media=prompt.media,
        stop=fields.stop_strings,
        include_stop=fields.include_stop_str_in_output,
        echo=wanted.echo,
        lead=wanted.lead,
        details=wanted.details,
    )


async def respond(
    request: Request,
    services: Services,
    ticket: Ticket,
    fields: GenerationFields,
    order: Order,
    shape: Shape,
    told: Mapping[str, Any] = MappingProxyType({}),
) -> Response:
    """`told` stands beside the choices, in a stream beside the first."""
    generation = Generation(order, services.client, services.model.tokenizer, services.metrics, ticket)
    if fields.stream:
        bodies = chunks(generation, shape, fields.stream_options, told)
        return EventStream(bodies, keep_alive=services.settings.keep_alive)
    return JSONResponse(await unless_disconnected(request.receive, whole(generation, shape, fields.n, told)))


async def whole(generation: Generation, shape: Shape, num_answers: int, told: Mapping[str, Any]) -> dict[str, Any]:
    wholes = [Piece("", index=index) for index in range(num_answers)]
    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            wholes[piece.index].add(piece)
    choices = [shape.choice(answer, generation) for answer in wholes]
    return {**shape.head(is_stream=False), **told, "choices": choices, "usage": generation.usage()}


async def chunks(
    generation: Generation, shape: Shape, options: StreamOptions, told: Mapping[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    head, begun = shape.head(is_stream=True), set[int]()
    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            for choice in shape.deltas(piece, generation, is_first=piece.index not in begun):
                chunk = {**head, **told, "choices": [choice]}
                told = {}
                if options.include_usage or options.continuous_usage_stats:
                    chunk["usage"] = generation.usage() if options.continuous_usage_stats else None
                yield chunk
            begun.add(piece.index)
    if options.include_usage:
        yield {**head, "choices": [], "usage": generation.usage()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What may stand beside a choice's text, and was asked for."""

    model: ServedModel
    prompt: PreparedPrompt
    prompt_logprobs: bool = False
    token_ids: bool = False

    def of(self, piece: Piece, generation: Generation, *, is_first: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.prompt_logprobs and is_first:
            found["prompt_logprobs"] = prompt_logprobs(generation.prompt_scores, self.model.tokenizer)
        if self.token_ids:
            found["prompt_token_ids"] = self.prompt.encoded.token_ids if is_first else None
            found["token_ids"] = [token.token_id for token in piece.tokens if not token.is_prompt]
        return found


class CompletionShape:
    """OpenAI's completion: text, and log-probabilities as four lists."""

    def __init__(self, request_id: str, beside: Beside, *, logprobs: bool) -> None:
        self._created = int(time.time())
        self._id = f"cmpl-{request_id}"
        self._beside = beside
        self._logprobs = logprobs

    def head(self, *, is_stream: bool) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._beside.model.name,
        }

    def choice(self, whole: Piece, generation: Generation) -> dict[str, Any]:
        return next(self.deltas(whole, generation, is_first=True))

    def deltas(self, piece: Piece, generation: Generation, *, is_first: bool) -> Iterator[dict[str, Any]]:
        tokenizer = self._beside.model.tokenizer
        yield {
            "index": piece.index,
            "text": piece.text,
            "logprobs": completion_logprobs(piece.tokens, tokenizer) if self._logprobs else None,
            "finish_reason": piece.finish_reason,
            **self._beside.of(piece, generation, is_first=is_first),
        }
