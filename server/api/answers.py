"""Responds to generation requests: turns the engine's events into answers, whole or streamed.

Every route that generates uses this module, so text, stop strings and usage mean the same everywhere. A `Shape` determines
only the JSON of an answer, not how its text is made.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import msgspec
from starlette.responses import Response

from model.prompt import PromptTokenizer
from server.api.answer_text import AnswerPiece, AnswerText, Echo, completion_logprobs, prompt_logprobs
from server.api.generation import GenerationRequest
from server.api.responses import JSONResponse, response_head
from server.api.services import Services
from server.api.sse import EventStream
from server.api.writer import Writer
from server.concurrency import merge
from server.engine_client.client import EngineClient
from server.schemas.generation import MAX_ANSWERS, CompletionFields, GenerationFields, StreamOptions
from server.telemetry.request_record import RequestRecord
from server.wire import Admitted, Finished, Generate, PromptScored, Token, TokenLogprob


@dataclass(slots=True)
class AnswerStream:
    """The answers to one prompt while the engine generates them; the first has the index `first` in the response.

    What all answers repeat of the prompt is computed once, because the prompt may be long.
    """

    generation: GenerationRequest
    engine: EngineClient
    tokenizer: PromptTokenizer
    record: RequestRecord
    writer: Writer
    first: int = 0
    prompt_scores: list[TokenLogprob | None] = field(default_factory=list)
    by_index: dict[int, AnswerText] = field(default_factory=dict)  # from the first event on
    _echo: Echo | None = None
    _echo_logprobs: dict[str, list[Any]] | None = None
    _prompt_logprobs: msgspec.Raw | None = None

    async def pieces(self) -> AsyncGenerator[AnswerPiece, None]:
        """Yield pieces of all answers up to the last finish reason. Closed early, it aborts the request."""
        prompt, record, is_admitted = self.generation.prompt, self.record, False
        request = Generate(
            request_id=record.begin_prompt(prompt.num_tokens, prompt.encoded.media, prompt.encoded.shots_attend),
            prompt=prompt.encoded,
            sampling=self.generation.sampling,
            priority=record.priority,
            client=record.client,
            arrived=record.arrived,
        )
        async with aclosing(self.engine.stream(request, prompt.media)) as events:
            async for event in events:
                match event:
                    case Admitted():
                        if not is_admitted:  # the first of several answers computes the prompt for all
                            record.admitted(event, prompt.num_tokens)
                        is_admitted = True
                    case PromptScored():
                        self.prompt_scores = event.logprobs
                    case _:
                        if event.index not in self.by_index and (echo := await self._begin(event.index)):
                            yield echo
                        if piece := self._take(event, request.request_id):
                            yield piece
                        if self._are_finished():
                            return

    async def _begin(self, index: int) -> AnswerPiece | None:
        """Begin an answer, and return the prompt as its first piece if the prompt is repeated."""
        if self.generation.echo and self._echo is None:
            ids = self.generation.prompt.encoded.token_ids
            write = partial(Echo.of, ids, self.prompt_scores, self.tokenizer)
            self._echo = await self.writer.write(len(ids), write)
        answer = AnswerText(self.generation, self.first + index, self.tokenizer, self._echo)
        self.by_index[index] = answer
        return answer.first_piece()

    def _take(self, event: Token | Finished, request_id: str) -> AnswerPiece | None:
        answer = self.by_index[event.index]
        if answer.finish_reason is not None:
            return None  # it was ended by a stop string, of which the engine does not know
        if isinstance(event, Token):
            self.record.token(self.first + event.index, event)
        piece = answer.take(event)
        if piece.finish_reason is not None and event.finish_reason is None and not self._are_finished():
            # otherwise the engine would continue to decode this answer until the last answer ends
            self.engine.end_answer(request_id, event.index)
        return piece

    def _are_finished(self) -> bool:
        """Return whether every answer has a finish reason; the record then gets that of the last answer."""
        answers = sorted(self.by_index.items())
        reasons = [answer.finish_reason for _, answer in answers if answer.finish_reason is not None]
        if len(reasons) < self.generation.sampling.n:
            return False
        self.record.finish_reason = reasons[-1]
        return True

    def num_shown(self, piece: AnswerPiece, *, is_first: bool) -> int:
        """Return the number of tokens that a choice shows, each of which may have alternatives."""
        shows_prompt = self.generation.shows_prompt_logprobs and is_first
        return len(piece.tokens) + (len(self.prompt_scores) if shows_prompt else 0)

    def logprobs(self, piece: AnswerPiece) -> dict[str, list[Any]]:
        """Return the log-probabilities of a piece, as a completion shows them."""
        num_repeated = sum(token.is_prompt for token in piece.tokens)
        new = completion_logprobs(piece.tokens[num_repeated:], self.tokenizer)
        if not num_repeated:
            return new
        if self._echo_logprobs is None:
            self._echo_logprobs = completion_logprobs(piece.tokens[:num_repeated], self.tokenizer)
            tops = self._echo_logprobs["top_logprobs"]
            self._echo_logprobs["top_logprobs"] = [msgspec.Raw(msgspec.json.encode(top)) for top in tops]
        return {name: [*repeated, *new[name]] for name, repeated in self._echo_logprobs.items()}

    def extras(self, piece: AnswerPiece, *, is_first: bool) -> dict[str, Any]:
        """Return the requested fields of a choice besides its text: the prompt's log-probabilities, token ids."""
        extras: dict[str, Any] = {}
        if self.generation.shows_prompt_logprobs and is_first:
            if self._prompt_logprobs is None:
                by_token = prompt_logprobs(self.prompt_scores, self.tokenizer)
                self._prompt_logprobs = msgspec.Raw(msgspec.json.encode(by_token))
            extras["prompt_logprobs"] = self._prompt_logprobs
        if self.generation.shows_token_ids:
            extras["prompt_token_ids"] = self.generation.prompt.encoded.token_ids if is_first else None
            extras["token_ids"] = [token.token_id for token in piece.tokens if not token.is_prompt]
        return extras


class Shape(Protocol):
    """The JSON form of a route's answer: the prefix of its id, its `object`, whole and in chunks, and its choices.

    `fields` are those of the request, which determine what is shown.
    `extras` are fields of the answer next to `choices`; in a stream, only of the first chunk.
    """

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    @property
    def fields(self) -> GenerationFields: ...

    @property
    def extras(self) -> Mapping[str, Any]: ...

    def choice(self, answer: AnswerPiece, stream: AnswerStream) -> dict[str, Any]:
        """Return a whole answer, which is one piece, as a choice."""
        ...

    def deltas(self, piece: AnswerPiece, stream: AnswerStream, *, is_first: bool) -> Iterator[dict[str, Any]]:
        """Yield a piece as the choices of one or more chunks; `is_first`: it is the first piece of its answer."""
        ...


async def respond(
    services: Services, record: RequestRecord, generations: Sequence[GenerationRequest], shape: Shape
) -> Response:
    """Generate the answers to each prompt, and respond whole or with a stream."""
    fields, tokenizer = shape.fields, services.model.tokenizer
    record.priority = fields.priority
    streams = [
        AnswerStream(generation, services.engine, tokenizer, record, services.writer, index * generation.sampling.n)
        for index, generation in enumerate(generations)
    ]
    kind = shape.chunk_object if fields.stream else shape.whole_object
    head = response_head(kind, shape.prefix, fields, record, services.model)
    if fields.stream:
        bodies = chunks(streams, record, shape, head, fields.stream_options)
        return EventStream(bodies, keep_alive=services.settings.keep_alive)
    return await whole(streams, record, shape, head)


async def pieces_of(streams: Sequence[AnswerStream], record: RequestRecord) -> AsyncGenerator[AnswerPiece, None]:
    """Yield the pieces of all answers to all prompts.

    At most `MAX_ANSWERS` answers or beams of one request are in the engine at once: further prompts begin as others end.
    """
    sampling = streams[0].generation.sampling
    limit = max(MAX_ANSWERS // max(sampling.n, sampling.beam_width), 1)
    with record:
        # a single prompt needs no tasks
        merged = streams[0].pieces() if len(streams) == 1 else merge((stream.pieces() for stream in streams), limit)
        async with aclosing(merged) as pieces:
            async for piece in pieces:
                yield piece


async def whole(streams: Sequence[AnswerStream], record: RequestRecord, shape: Shape, head: dict[str, Any]) -> Response:
    """Return the response with all answers, once the last one is complete."""
    num_answers = streams[0].generation.sampling.n
    answers = [
        (AnswerPiece("", index=stream.first + number), stream) for stream in streams for number in range(num_answers)
    ]
    async with aclosing(pieces_of(streams, record)) as pieces:
        async for piece in pieces:
            answers[piece.index][0].add(piece)

    def write() -> Response:
        choices = [shape.choice(answer, stream) for answer, stream in answers]
        return JSONResponse({**head, **shape.extras, "choices": choices, "usage": record.usage()})

    num_shown = sum(stream.num_shown(answer, is_first=True) for answer, stream in answers)
    return await streams[0].writer.write(num_shown, write)


async def chunks(
    streams: Sequence[AnswerStream], record: RequestRecord, shape: Shape, head: dict[str, Any], options: StreamOptions
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the chunks of a streamed response, as the answers grow."""
    extras, begun = shape.extras, set[int]()
    num_answers = streams[0].generation.sampling.n
    async with aclosing(pieces_of(streams, record)) as pieces:
        async for piece in pieces:
            stream, is_first = streams[piece.index // num_answers], piece.index not in begun
            write: Callable[[], list[dict[str, Any]]] = partial(list, shape.deltas(piece, stream, is_first=is_first))
            num_shown = stream.num_shown(piece, is_first=is_first)
            for choice in await stream.writer.write(num_shown, write):
                chunk = {**head, **extras, "choices": [choice]}
                extras = {}
                if options.include_usage or options.continuous_usage_stats:
                    chunk["usage"] = record.usage() if options.continuous_usage_stats else None
                yield chunk
            begun.add(piece.index)
    if options.include_usage:
        yield {**head, "choices": [], "usage": record.usage()}


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """OpenAI's completion: text, and log-probabilities as four lists."""

    prefix: ClassVar = "cmpl"
    whole_object: ClassVar = "text_completion"
    chunk_object: ClassVar = "text_completion"

    fields: CompletionFields
    extras: Mapping[str, Any] = field(default_factory=dict)

    def choice(self, answer: AnswerPiece, stream: AnswerStream) -> dict[str, Any]:
        return next(self.deltas(answer, stream, is_first=True))

    def deltas(self, piece: AnswerPiece, stream: AnswerStream, *, is_first: bool) -> Iterator[dict[str, Any]]:
        is_scored = self.fields.logprobs is not None
        yield {
            "index": piece.index,
            "text": piece.text,
            "logprobs": stream.logprobs(piece) if is_scored else None,
            "finish_reason": piece.finish_reason,
            **stream.extras(piece, is_first=is_first),
        }
