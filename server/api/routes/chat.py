"""POST /v1/chat/completions in OpenAI's shape: turns become shots, the last one the query (see `chat_prompt`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.answer_text import Piece
from server.api.answers import Answers, choice_extras, respond
from server.api.body import read_request
from server.api.chat_prompt import ChatPrompt, prepare_chat
from server.api.generation import GenerationRequest, make_sampling, stop_strings
from server.api.logprobs import chat_logprobs
from server.api.openapi import PROMPT, describe
from server.api.services import GivenRecord, GivenServices
from server.errors import InvalidRequest
from server.schemas.chat import DEFAULT_MAX_TOKENS, ChatRequest
from server.schemas.responses.completions import ChatCompletion, ChatCompletionChunk
from server.served_model import ServedModel

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    **describe("Chat", body=ChatRequest, response=ChatCompletion, chunk=ChatCompletionChunk, errors=PROMPT),
)
async def create_chat_completion(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Continue a conversation, written as a few-shot prompt."""
    fields = await read_request(ChatRequest, request, services)
    _check(fields)
    chat = await prepare_chat(fields.messages, fields.template, services.model, services.intake)
    generation = chat_request(fields, chat, services.model)
    shape = ChatShape(fields.request_id or record.request_id, generation, services.model, fields)
    return await respond(request, services, record, fields, generation, shape)


def _check(fields: ChatRequest) -> None:
    """Check what concerns more than one field."""
    if None not in (fields.max_tokens, fields.max_completion_tokens) and fields.max_tokens != fields.length:
        message = "max_tokens and max_completion_tokens are two names of one number: these differ"
        raise InvalidRequest(message, param="max_completion_tokens")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if fields.response_format.type != "text" and fields.structured_outputs.model_fields_set:
        message = "response_format and structured_outputs both state the form of the answer: give one"
        raise InvalidRequest(message, param="response_format")


def chat_request(fields: ChatRequest, chat: ChatPrompt, model: ServedModel) -> GenerationRequest:
    """Raises `InvalidRequest`."""
    sampling = make_sampling(
        fields,
        chat.prompt,
        model,
        chat.template,
        max_tokens=DEFAULT_MAX_TOKENS if fields.length is None else fields.length,
        is_default=fields.length is None,
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )
    return GenerationRequest(
        prompt=chat.prompt,
        sampling=sampling,
        stop=stop_strings(fields, chat.template),
        include_stop=fields.include_stop_str_in_output,
        lead=chat.template.lead,
        shows_token_ids=fields.return_token_ids,
    )


class ChatShape:
    """OpenAI's chat completion. The first chunk of a streamed answer has the role, the others what is added."""

    def __init__(self, answer_id: str, generation: GenerationRequest, model: ServedModel, fields: ChatRequest) -> None:
        self._id = f"chatcmpl-{answer_id}"
        self._created = int(time.time())
        self._model = model
        self._generation = generation
        self._fields = fields

    def head(self, *, is_stream: bool) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk" if is_stream else "chat.completion",
            "created": self._created,
            "model": self._model.name,
        }

    def choice(self, whole: Piece, answers: Answers) -> dict[str, Any]:
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return {"index": whole.index, "message": message, **self._rest(whole, answers, is_first=True)}

    def deltas(self, piece: Piece, answers: Answers, *, is_first: bool) -> Iterator[dict[str, Any]]:
        if is_first:
            delta = {"role": "assistant", "content": ""}
            yield {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None}
        delta = {"content": piece.text}
        yield {"index": piece.index, "delta": delta, **self._rest(piece, answers, is_first=is_first)}

    def _rest(self, piece: Piece, answers: Answers, *, is_first: bool) -> dict[str, Any]:
        tokenizer, num_top = self._model.tokenizer, self._fields.top_logprobs or 0
        return {
            "logprobs": chat_logprobs(piece.tokens, tokenizer, num_top) if self._fields.logprobs else None,
            "finish_reason": piece.finish_reason,
            **choice_extras(self._generation, piece, answers, tokenizer, is_first=is_first),
        }
