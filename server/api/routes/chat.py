"""POST /v1/chat/completions in OpenAI's shape: turns become shots, the last one the query (see `chat_prompt`).

The same path as a completion: read, check, order, answer; what differs is how a prompt is said and an answer looks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.answer_text import Piece
from server.api.answers import Beside, Wanted, make_order, respond
from server.api.body import read_body
from server.api.chat_prompt import read_chat
from server.api.generation import Generation
from server.api.logprobs import chat_logprobs
from server.api.services import GivenServices, GivenTicket
from server.api.templated import in_template
from server.errors import InvalidRequest
from server.schemas.chat import DEFAULT_MAX_TOKENS, ChatRequest, TextFormat
from server.schemas.completions import read

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, services: GivenServices, ticket: GivenTicket) -> Response:
    accepted, request_id = time.monotonic(), request.state.request_id
    fields = read(ChatRequest, await read_body(request, services.settings))
    services.check_model(fields.model)
    _check(fields)
    chat = await read_chat(fields.messages, fields.template, services.model, services.media)
    fields = in_template(_plain_form(fields), chat.template, services.model)
    order = make_order(fields, _wanted(fields, chat.template.lead), chat.prompt, services, request_id, accepted)
    beside = Beside(model=services.model, prompt=chat.prompt, token_ids=fields.return_token_ids)
    shape = ChatShape(fields.request_id or request_id, beside, fields.top_logprobs, logprobs=fields.logprobs)
    return await respond(request, services, ticket, fields, order, shape)


def _check(fields: ChatRequest) -> None:
    """What one field alone does not tell."""
    if None not in (fields.max_tokens, fields.max_completion_tokens) and fields.max_tokens != fields.length:
        message = "max_tokens and max_completion_tokens are two names of one number: these differ"
        raise InvalidRequest(message, param="max_completion_tokens")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if fields.response_format.type != "text" and fields.structured_outputs.model_fields_set:
        message = "response_format and structured_outputs both say which form the answer has: give one"
        raise InvalidRequest(message, param="response_format")


def _plain_form(fields: ChatRequest) -> ChatRequest:
    """The form of the answer under the one name that all routes share."""
    return fields.model_copy(update={"structured_outputs": fields.form, "response_format": TextFormat(type="text")})


def _wanted(fields: ChatRequest, lead: str) -> Wanted:
    return Wanted(
        max_tokens=DEFAULT_MAX_TOKENS if fields.length is None else fields.length,
        is_default=fields.length is None,
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        lead=lead,
    )


class ChatShape:
    """OpenAI's chat completion. A stream's first chunk of an answer says whose it is, the rest what is added."""

    def __init__(self, request_id: str, beside: Beside, top_logprobs: int | None, *, logprobs: bool) -> None:
        self._created = int(time.time())
        self._id = f"chatcmpl-{request_id}"
        self._beside = beside
        self._num_top = top_logprobs or 0
        self._logprobs = logprobs

    def head(self, *, is_stream: bool) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk" if is_stream else "chat.completion",
            "created": self._created,
            "model": self._beside.model.name,
        }

    def choice(self, whole: Piece, generation: Generation) -> dict[str, Any]:
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return {"index": whole.index, "message": message, **self._rest(whole, generation, is_first=True)}

    def deltas(self, piece: Piece, generation: Generation, *, is_first: bool) -> Iterator[dict[str, Any]]:
        if is_first:
            delta = {"role": "assistant", "content": ""}
            yield {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None}
        delta = {"content": piece.text}
        yield {"index": piece.index, "delta": delta, **self._rest(piece, generation, is_first=is_first)}

    def _rest(self, piece: Piece, generation: Generation, *, is_first: bool) -> dict[str, Any]:
        tokenizer = self._beside.model.tokenizer
        return {
            "logprobs": chat_logprobs(piece.tokens, tokenizer, self._num_top) if self._logprobs else None,
            "finish_reason": piece.finish_reason,
            **self._beside.of(piece, generation, is_first=is_first),
        }
