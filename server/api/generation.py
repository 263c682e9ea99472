"""One request while it runs: the engine's events become pieces of text with their tokens, and the counts for `usage`.

Every route that generates goes through here, so text, stop strings, usage and metrics mean the same everywhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from model.tokenizer import PromptTokenizer
from server.api.admission import Ticket
from server.engine.client import Client
from server.engine.detokenizer import Detokenizer, StopStrings
from server.engine.wire import Admitted, Finished, FinishReason, Generate, PromptScored, Token, TokenLogprob
from server.media.source import EncodedMedia
from server.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token, where its text begins in the answer, and its log-probability if one was asked for."""

    token_id: int
    offset: int
    logprob: TokenLogprob | None
    is_prompt: bool = False


@dataclass(slots=True)
class Piece:
    """What there is to show next. Text may lag behind tokens: half characters and beginnings of stops are held back."""

    text: str
    tokens: list[ShownToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a route asks for. `echo` puts the prompt's text in front of the answer's."""

    request: Generate
    media: Mapping[bytes, EncodedMedia]
    stop: Sequence[str] = ()
    include_stop: bool = False
    echo: bool = False


class Generation:
    def __init__(
        self, order: Order, client: Client, tokenizer: PromptTokenizer, metrics: Metrics, ticket: Ticket
    ) -> None:
        self.num_tokens = 0
        self.prompt_scores: list[TokenLogprob | None] = []
        self._order = order
        self._client = client
        self._metrics = metrics
        self._ticket = ticket
        self._admitted: Admitted | None = None
        self._last_token: float | None = None
        self._time_to_first_token: float | None = None
        self._text = Detokenizer(tokenizer, () if order.echo else order.request.token_ids)
        self._stop = StopStrings(order.stop, include=order.include_stop)
        self._length = 0
        self._is_echoed = False

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces up to the one with a finish reason; with `echo` the first is the prompt. Closed early, it aborts."""
        reason: FinishReason = "abort"
        try:
            async with aclosing(self._client.stream(self._order.request, self._order.media)) as events:
                async for event in events:
                    match event:
                        case Admitted():
                            self._admit(event)
                        case PromptScored():
                            self.prompt_scores = event.logprobs
                        case _:
                            if self._order.echo and not self._is_echoed:
                                yield self._echo()
                            piece = self._take(event)
                            reason = piece.finish_reason or reason
                            yield piece
                            if piece.finish_reason is not None:
                                return
        except Exception:
            reason = "error"
            raise
        finally:
            self._end(reason)

    def usage(self) -> dict[str, Any]:
        request, admitted = self._order.request, self._admitted
        return {
            "prompt_tokens": len(request.token_ids),
            "completion_tokens": self.num_tokens,
            "total_tokens": len(request.token_ids) + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": admitted.cached_tokens if admitted else 0},
            "fewshot_details": {
                "media": len(request.media),
                "media_encoded": admitted.media_encoded if admitted else 0,
                "media_cached": admitted.media_cached if admitted else 0,
                "media_deduplicated": len(request.media) - len(set(request.media)),
            },
        }

    def _admit(self, event: Admitted) -> None:
        self._ticket.started()
        self._admitted = event
        metrics, num_prompt_tokens = self._metrics, len(self._order.request.token_ids)
        metrics.request_queue_time.observe(event.queue_seconds)
        metrics.request_prompt_tokens.observe(num_prompt_tokens)
        metrics.request_media.observe(len(self._order.request.media))
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.prompt_tokens_cached.inc(event.cached_tokens)
        metrics.media_encoded.inc(event.media_encoded)
        metrics.media_cached.inc(event.media_cached)

    def _echo(self) -> Piece:
        """The prompt as a piece. Stop strings do not apply to it."""
        self._is_echoed = True
        ids = self._order.request.token_ids
        scores = self.prompt_scores or [None] * len(ids)
        piece = Piece("")
        for token_id, score in zip(ids, scores, strict=True):
            piece.tokens.append(ShownToken(token_id, self._length, score, is_prompt=True))
            piece.text += self._counted(self._text.push(token_id))
        return piece

    def _take(self, event: Token | Finished) -> Piece:
        if isinstance(event, Finished):
            return Piece(self._rest(), [], event.finish_reason)
        self._clock()
        piece = Piece("", [ShownToken(event.token_id, self._length, event.logprob)], event.finish_reason)
        if event.finish_reason != "stop":  # else it is an end-of-sequence or stop token, which has no text
            piece.text = self._let_through(self._text.push(event.token_id))
        if event.finish_reason is not None:
            piece.text += self._rest()
        if self._stop.is_stopped:
            piece.finish_reason = "stop"
        return piece

    def _let_through(self, text: str) -> str:
        self._counted(text)
        return self._stop.push(text) if self.num_tokens > self._order.request.sampling.min_tokens else text

    def _rest(self) -> str:
        return self._let_through(self._text.finish()) + self._stop.finish()

    def _counted(self, text: str) -> str:
        self._length += len(text)
        return text

    def _clock(self) -> None:
        now, self.num_tokens = time.monotonic(), self.num_tokens + 1
        self._metrics.generation_tokens.inc()
        if self._last_token is None:
            self._time_to_first_token = now - self._order.request.arrived
            self._metrics.time_to_first_token.observe(self._time_to_first_token)
        else:
            self._metrics.inter_token_latency.observe(now - self._last_token)
        self._last_token = now

    def _end(self, reason: FinishReason) -> None:
        seconds = time.monotonic() - self._order.request.arrived
        self._metrics.finished(reason)
        if reason in ("stop", "length"):
            self._metrics.e2e_request_latency.observe(seconds)
            self._metrics.request_generation_tokens.observe(self.num_tokens)
        first = self._time_to_first_token
        logger.info(
            "request finished",
            extra={
                "request_id": self._order.request.request_id,
                "finish_reason": reason,
                "prompt_tokens": len(self._order.request.token_ids),
                "media": len(self._order.request.media),
                "completion_tokens": self.num_tokens,
                "first_token_seconds": None if first is None else round(first, 4),
                "seconds": round(seconds, 4),
            },
        )
