"""POST /v1/completions in OpenAI's shape, for prompts that may hold media.

The route reads as its steps: read, check, generate, answer. `Answer` knows the shape and nothing of how text is made.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.answer_text import Order, Piece
from server.api.body import JSONResponse, read_body
from server.api.generation import Generation
from server.api.logprobs import completion_logprobs, prompt_logprobs
from server.api.prompts import ReadPrompt, check_length, read_prompt
from server.api.sampling import sampling
from server.api.schemas import CompletionRequest, read
from server.api.services import GivenServices, GivenTicket, Services
from server.api.sse import EventStream, unless_disconnected
from server.engine.wire import Generate
from server.served_model import ServedModel

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    accepted = time.monotonic()
    fields = read(CompletionRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    prompt = read_prompt(fields.prompt, services.model.tokenizer, services.model.num_token_ids, services.settings)
    order = _order(fields, prompt, services, request.state.request_id, accepted)
    generation = Generation(order, services.client, services.model.tokenizer, services.metrics, ticket)
    answer = Answer(fields, prompt, services.model, fields.request_id or request.state.request_id)
    if fields.stream:
        return EventStream(answer.chunks(generation), keep_alive=services.settings.keep_alive)
    return JSONResponse(await unless_disconnected(request.receive, answer.whole(generation)))


def _order(
    fields: CompletionRequest, prompt: ReadPrompt, services: Services, request_id: str, accepted: float
) -> Order:
    room = services.model.max_model_len - prompt.num_tokens
    # a default is cut to the room there is, a number that was asked for is not
    max_tokens = fields.max_tokens if "max_tokens" in fields.model_fields_set else max(0, min(fields.max_tokens, room))
    check_length(prompt, max_tokens, services.model.max_model_len)
    request = Generate(
        # a client may use its id twice, the engine must not
        request_id=f"{request_id}-{uuid.uuid4().hex[:8]}",
        token_ids=prompt.encoded.token_ids,
        media_index=prompt.encoded.media_index,
        media=prompt.encoded.media,
        sampling=sampling(
            fields, max_tokens, services.model.num_token_ids, fields.logprobs, _num_prompt_logprobs(fields)
        ),
        priority=fields.priority,
        arrived=accepted,
    )
    return Order(
        request=request,
        media=prompt.media,
        stop=fields.stop_strings,
        include_stop=fields.include_stop_str_in_output,
        echo=fields.echo,
    )


def _num_prompt_logprobs(fields: CompletionRequest) -> int | None:
    """Asked for by itself, or because the echoed prompt shows its log-probabilities too."""
    asked = [fields.prompt_logprobs, fields.logprobs if fields.echo else None]
    return max((count for count in asked if count is not None), default=None)


class Answer:
    def __init__(self, fields: CompletionRequest, prompt: ReadPrompt, model: ServedModel, request_id: str) -> None:
        self._fields = fields
        self._prompt = prompt
        self._model = model
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }

    async def whole(self, generation: Generation) -> dict[str, Any]:
        wholes = [Piece("", index=index) for index in range(self._fields.n)]
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                wholes[piece.index].add(piece)
        choices = [self._choice(whole, generation, is_first=True) for whole in wholes]
        return {**self._head, "choices": choices, "usage": generation.usage()}

    async def chunks(self, generation: Generation) -> AsyncGenerator[dict[str, Any], None]:
        options, begun = self._fields.stream_options, set[int]()
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                choice = self._choice(piece, generation, is_first=piece.index not in begun)
                begun.add(piece.index)
                chunk = {**self._head, "choices": [choice]}
                if options.include_usage or options.continuous_usage_stats:
                    chunk["usage"] = generation.usage() if options.continuous_usage_stats else None
                yield chunk
        if options.include_usage:
            yield {**self._head, "choices": [], "usage": generation.usage()}

    def _choice(self, piece: Piece, generation: Generation, *, is_first: bool) -> dict[str, Any]:
        fields = self._fields
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        if fields.logprobs is not None:
            choice["logprobs"] = completion_logprobs(piece.tokens, self._model.tokenizer)
        if fields.prompt_logprobs is not None and is_first:
            choice["prompt_logprobs"] = prompt_logprobs(generation.prompt_scores, self._model.tokenizer)
        if fields.return_token_ids:
            choice["prompt_token_ids"] = self._prompt.encoded.token_ids if is_first else None
            choice["token_ids"] = [token.token_id for token in piece.tokens if not token.is_prompt]
        return choice
