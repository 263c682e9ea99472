"""POST /v1/chat/completions in OpenAI's shape: turns become shots, the last one the query (see `chat_prompt`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.answer_text import AnswerPiece, chat_logprobs
from server.api.answers import AnswerStream, respond
from server.api.body import read_request
from server.api.chat_prompt import prepare_chat
from server.api.generation import completion_requests
from server.api.openapi import PROMPT, describe
from server.api.services import GivenRecord, GivenServices, Services
from server.api.sse import unless_disconnected
from server.errors import InvalidRequest
from server.schemas.generation import ChatRequest, Function
from server.schemas.responses.completions import ChatCompletion, ChatCompletionChunk
from server.telemetry.request_record import RequestRecord

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    **describe("Chat", body=ChatRequest, response=ChatCompletion, chunk=ChatCompletionChunk, errors=PROMPT),
)
async def create_chat_completion(request: Request, services: GivenServices, record: GivenRecord) -> Response:
    """Answer a conversation, which is written as a few-shot prompt."""
    fields = await read_request(ChatRequest, request, services)
    _check(fields)
    work = _answer(fields, record, services.with_salt(fields.cache_salt))
    return await unless_disconnected(request.receive, work)


async def _answer(fields: ChatRequest, record: RequestRecord, services: Services) -> Response:
    prompt, template = await prepare_chat(fields.messages, fields.template, services.model, services.intake)
    if fields.shots_attend == "alone":
        prompt = prompt.alone(services.model)
    generations = completion_requests(
        fields.completion(), [prompt], services.model, template=template, form_field=fields.form.field
    )
    return await respond(services, record, generations, ChatShape(fields, fields.called))


def _check(fields: ChatRequest) -> None:
    """Check combinations of fields. Raises `InvalidRequest`."""
    lengths = {fields.max_tokens, fields.max_completion_tokens} - {None}
    if len(lengths) > 1:
        message = "max_tokens and max_completion_tokens are two names of one field, but their values differ"
        raise InvalidRequest(message, param="max_completion_tokens")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    has_format = fields.response_format.type != "text"
    has_outputs = fields.structured_outputs is not None
    if fields.called is not None and (has_format or has_outputs):
        raise InvalidRequest(
            "the function call determines the form of the answer: do not set another one", param="tool_choice"
        )
    if fields.called is not None and (fields.stop or fields.stop_token_ids):
        raise InvalidRequest(
            "a function call ends where its arguments end: leave out stop and stop_token_ids",
            param="stop" if fields.stop else "stop_token_ids",
        )
    if has_format and has_outputs:
        message = "response_format and structured_outputs both set the form of the answer: send only one of them"
        raise InvalidRequest(message, param="response_format")


@dataclass(frozen=True, slots=True)
class ChatShape:
    """OpenAI's chat completion. The first chunk of a streamed answer has the role, the others the new text.

    The text of an answer that calls a function is the function's arguments.
    """

    prefix: ClassVar = "chatcmpl"
    whole_object: ClassVar = "chat.completion"
    chunk_object: ClassVar = "chat.completion.chunk"
    extras: ClassVar[Mapping[str, Any]] = {}

    fields: ChatRequest
    called: Function | None

    def choice(self, answer: AnswerPiece, stream: AnswerStream) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if self.called is not None:
            call = self._call(answer, stream)
            call["function"]["arguments"] = answer.text
            message |= {"content": None, "tool_calls": [call]}
        return {"index": answer.index, "message": message, **self._rest(answer, stream, is_first=True)}

    def deltas(self, piece: AnswerPiece, stream: AnswerStream, *, is_first: bool) -> Iterator[dict[str, Any]]:
        if is_first:
            delta: dict[str, Any] = {"role": "assistant", "content": ""}
            if self.called is not None:
                delta |= {"content": None, "tool_calls": [{"index": 0, **self._call(piece, stream)}]}
            yield {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None}
        delta = {"content": piece.text}
        if self.called is not None:
            delta = {"tool_calls": [{"index": 0, "function": {"arguments": piece.text}}]}
        yield {"index": piece.index, "delta": delta, **self._rest(piece, stream, is_first=is_first)}

    def _call(self, piece: AnswerPiece, stream: AnswerStream) -> dict[str, Any]:
        """Return a call without its arguments."""
        assert self.called is not None
        call_id = f"call_{stream.record.request_id}_{piece.index}"
        return {"id": call_id, "type": "function", "function": {"name": self.called.name, "arguments": ""}}

    def _rest(self, piece: AnswerPiece, stream: AnswerStream, *, is_first: bool) -> dict[str, Any]:
        num_top = self.fields.top_logprobs or 0
        # OpenAI's clients expect "tool_calls" of an answer that must call any function, and "stop" of a named one
        is_call = piece.finish_reason == "stop" and self.fields.tool_choice == "required"
        return {
            "logprobs": chat_logprobs(piece.tokens, stream.tokenizer, num_top) if self.fields.logprobs else None,
            "finish_reason": "tool_calls" if is_call else piece.finish_reason,
            **stream.extras(piece, is_first=is_first),
        }
