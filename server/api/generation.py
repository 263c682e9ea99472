"""One request while it runs: the engine's events become pieces of its answers, and the counts for `usage`.

Every route that generates goes through here, so text, stop strings, usage and metrics mean the same everywhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from model.tokenizer import PromptTokenizer
from server.admission import Ticket
from server.api.answer_text import AnswerText, Order, Piece
from server.engine_client.client import Client
from server.metrics import Metrics
from server.wire import Admitted, Finished, FinishReason, PromptScored, Token, TokenLogprob

logger = logging.getLogger(__name__)


class Generation:
    def __init__(
        self, order: Order, client: Client, tokenizer: PromptTokenizer, metrics: Metrics, ticket: Ticket
    ) -> None:
        self.prompt_scores: list[TokenLogprob | None] = []
        self._order = order
        self._client = client
        self._metrics = metrics
        self._ticket = ticket
        self._admitted: Admitted | None = None
        self._time_to_first_token: float | None = None
        self._answers = [AnswerText(order, index, tokenizer) for index in range(order.request.sampling.n)]

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self._answers)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces of all answers up to the last one's finish reason. Closed early, it aborts the request."""
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
                            for piece in self._take(event):
                                yield piece
                            if reasons := self._finish_reasons():
                                reason = reasons[-1]
                                return
        except Exception:
            reason = "error"
            raise
        finally:
            self._end(reason)

    def usage(self) -> dict[str, Any]:
        request, admitted = self._order.request, self._admitted
        return {
            "prompt_tokens": len(request.prompt.token_ids),
            "completion_tokens": self.num_tokens,
            "total_tokens": len(request.prompt.token_ids) + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": admitted.cached_tokens if admitted else 0},
            "fewshot_details": {
                "media": len(request.prompt.media),
                "media_encoded": admitted.media_encoded if admitted else 0,
                "media_cached": admitted.media_cached if admitted else 0,
                "media_deduplicated": len(request.prompt.media) - len(set(request.prompt.media)),
                **self._order.details,
            },
        }

    def _admit(self, event: Admitted) -> None:
        """Counted once, with the first of several answers: it computes the prompt for all."""
        if self._admitted is not None:
            return
        self._ticket.started()
        self._admitted = event
        metrics, num_prompt_tokens = self._metrics, len(self._order.request.prompt.token_ids)
        metrics.request_queue_time.observe(event.queue_seconds)
        metrics.request_prompt_tokens.observe(num_prompt_tokens)
        metrics.request_media.observe(len(self._order.request.prompt.media))
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.prompt_tokens_cached.inc(event.cached_tokens)
        metrics.media_encoded.inc(event.media_encoded)
        metrics.media_cached.inc(event.media_cached)

    def _take(self, event: Token | Finished) -> Iterator[Piece]:
        answer = self._answers[event.index]
        if answer.finish_reason is not None:
            return  # ended by a stop string, which the engine does not know
        if self._order.echo and not answer.is_begun:
            yield answer.echo(self.prompt_scores)
        if isinstance(event, Token):
            self._clock(answer)
        piece = answer.take(event)
        yield piece
        if piece.finish_reason is not None and event.finish_reason is None and not self._finish_reasons():
            # its stop string: the engine must be told, or it decodes on until the last answer ends
            self._client.end_answer(self._order.request.request_id, event.index)

    def _finish_reasons(self) -> list[FinishReason]:
        """Those of all answers, once each has one."""
        reasons = [answer.finish_reason for answer in self._answers if answer.finish_reason is not None]
        return reasons if len(reasons) == len(self._answers) else []

    def _clock(self, answer: AnswerText) -> None:
        now = time.monotonic()
        self._metrics.generation_tokens.inc()
        if self._time_to_first_token is None:
            self._time_to_first_token = now - self._order.request.arrived
            self._metrics.time_to_first_token.observe(self._time_to_first_token)
        if answer.last_token is not None:
            self._metrics.inter_token_latency.observe(now - answer.last_token)
        answer.last_token = now

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
                "prompt_tokens": len(self._order.request.prompt.token_ids),
                "media": len(self._order.request.prompt.media),
                "completion_tokens": self.num_tokens,
                "first_token_seconds": None if first is None else round(first, 4),
                "seconds": round(seconds, 4),
            },
        )
