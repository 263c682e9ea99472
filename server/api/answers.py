"""Answers a generation request: the engine's events become answers, whole or in pieces.

Every route that generates goes through here, so text, stop strings and usage mean the same everywhere. A `Shape` knows how
an answer looks, and nothing of how its text is made.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from model.tokenizer import PromptTokenizer
from server.api.answer_text import AnswerText, Piece
from server.api.body import JSONResponse
from server.api.generation import GenerationRequest
from server.api.logprobs import completion_logprobs, prompt_logprobs
from server.api.services import Services
from server.api.sse import EventStream, unless_disconnected
from server.engine_client.client import Client
from server.request_record import RequestRecord
from server.schemas.generation import CompletionFields, GenerationFields, StreamOptions
from server.served_model import ServedModel
from server.wire import Admitted, Finished, Generate, PromptScored, Token, TokenLogprob


class Answers:
    """The answers to one request while the engine makes them."""

    def __init__(
        self, generation: GenerationRequest, client: Client, tokenizer: PromptTokenizer, record: RequestRecord
    ) -> None:
        self.prompt_scores: list[TokenLogprob | None] = []
        self.record = record
        self._generation = generation
        self._client = client
        self._tokenizer = tokenizer
        self._is_admitted = False
        self._answers: dict[int, AnswerText] = {}  # by index, from the first event on
        self._request = Generate(
            request_id=record.new_engine_id(),
            prompt=generation.prompt.encoded,
            sampling=generation.sampling,
            priority=record.priority,
            arrived=record.arrived,
        )

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield pieces of all answers up to the last finish reason. Closed early, it aborts the request."""
        prompt = self._generation.prompt
        self.record.add_prompt(prompt.num_tokens, prompt.encoded.media)
        with self.record:
            async with aclosing(self._client.stream(self._request, prompt.media)) as events:
                async for event in events:
                    match event:
                        case Admitted():
                            self._admit(event)
                        case PromptScored():
                            self.prompt_scores = event.logprobs
                        case _:
                            for piece in self._take(event):
                                yield piece
                            if self._are_finished():
                                return

    def _admit(self, event: Admitted) -> None:
        """Count the first of several answers: it computes the prompt for all."""
        if not self._is_admitted:
            self._is_admitted = True
            self.record.admitted(event, self._generation.prompt.num_tokens)

    def _take(self, event: Token | Finished) -> Iterator[Piece]:
        if (answer := self._answers.get(event.index)) is None:
            answer = self._answers[event.index] = AnswerText(self._generation, event.index, self._tokenizer)
            if self._generation.echo:
                yield answer.echo(self.prompt_scores)
        if answer.finish_reason is not None:
            return  # a stop string ended it, which the engine does not know
        if isinstance(event, Token):
            self.record.token(event.index)
        piece = answer.take(event)
        yield piece
        if piece.finish_reason is not None and event.finish_reason is None and not self._are_finished():
            # without this the engine would decode on until the last answer ends
            self._client.end_answer(self._request.request_id, event.index)

    def _are_finished(self) -> bool:
        """Return whether every answer has a finish reason; the record then has that of the last answer."""
        answers = sorted(self._answers.items())
        reasons = [answer.finish_reason for _, answer in answers if answer.finish_reason is not None]
        if len(reasons) < self._generation.sampling.n:
            return False
        self.record.finish_reason = reasons[-1]
        return True


class Shape(Protocol):
    """The form of a route's answer."""

    def head(self, *, is_stream: bool) -> dict[str, Any]:
        """Return what surrounds the choices, in each chunk of a stream too."""
        ...

    def choice(self, whole: Piece, answers: Answers) -> dict[str, Any]: ...

    def deltas(self, piece: Piece, answers: Answers, *, is_first: bool) -> Iterator[dict[str, Any]]:
        """Yield a piece as the choices of one or more chunks; `is_first` of its answer."""
        ...


async def respond(
    request: Request,
    services: Services,
    record: RequestRecord,
    fields: GenerationFields,
    generation: GenerationRequest,
    shape: Shape,
) -> Response:
    """Generate, and answer whole or as a stream."""
    record.priority = fields.priority
    answers = Answers(generation, services.client, services.model.tokenizer, record)
    if fields.stream:
        bodies = chunks(answers, shape, fields.stream_options, dict(generation.extras))
        return EventStream(bodies, request.state.deadline, keep_alive=services.settings.keep_alive)
    return JSONResponse(await unless_disconnected(request.receive, whole(answers, shape, generation)))


async def whole(answers: Answers, shape: Shape, generation: GenerationRequest) -> dict[str, Any]:
    wholes = [Piece("", index=index) for index in range(generation.sampling.n)]
    async with aclosing(answers.pieces()) as pieces:
        async for piece in pieces:
            wholes[piece.index].add(piece)
    choices = [shape.choice(answer, answers) for answer in wholes]
    return {**shape.head(is_stream=False), **generation.extras, "choices": choices, "usage": answers.record.usage()}


async def chunks(
    answers: Answers, shape: Shape, options: StreamOptions, extras: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    head, begun = shape.head(is_stream=True), set[int]()
    async with aclosing(answers.pieces()) as pieces:
        async for piece in pieces:
            for choice in shape.deltas(piece, answers, is_first=piece.index not in begun):
                chunk = {**head, **extras, "choices": [choice]}
                extras = {}
                if options.include_usage or options.continuous_usage_stats:
                    chunk["usage"] = answers.record.usage() if options.continuous_usage_stats else None
                yield chunk
            begun.add(piece.index)
    if options.include_usage:
        yield {**head, "choices": [], "usage": answers.record.usage()}


def choice_extras(
    generation: GenerationRequest, piece: Piece, answers: Answers, tokenizer: PromptTokenizer, *, is_first: bool
) -> dict[str, Any]:
    """Return what was requested next to a choice's text: the prompt's log-probabilities, token ids."""
    extras: dict[str, Any] = {}
    if generation.shows_prompt_logprobs and is_first:
        extras["prompt_logprobs"] = prompt_logprobs(answers.prompt_scores, tokenizer)
    if generation.shows_token_ids:
        extras["prompt_token_ids"] = generation.prompt.encoded.token_ids if is_first else None
        extras["token_ids"] = [token.token_id for token in piece.tokens if not token.is_prompt]
    return extras


class CompletionShape:
    """OpenAI's completion: text, and log-probabilities as four lists."""

    def __init__(
        self, answer_id: str, generation: GenerationRequest, model: ServedModel, fields: CompletionFields
    ) -> None:
        self._head = {
            "id": f"cmpl-{answer_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }
        self._generation = generation
        self._tokenizer = model.tokenizer
        self._shows_logprobs = fields.logprobs is not None

    def head(self, *, is_stream: bool) -> dict[str, Any]:
        return self._head

    def choice(self, whole: Piece, answers: Answers) -> dict[str, Any]:
        return next(self.deltas(whole, answers, is_first=True))

    def deltas(self, piece: Piece, answers: Answers, *, is_first: bool) -> Iterator[dict[str, Any]]:
        yield {
            "index": piece.index,
            "text": piece.text,
            "logprobs": completion_logprobs(piece.tokens, self._tokenizer) if self._shows_logprobs else None,
            "finish_reason": piece.finish_reason,
            **choice_extras(self._generation, piece, answers, self._tokenizer, is_first=is_first),
        }
