"""The record of one request: its metrics, its log line, its stages and its `usage`, for every kind of engine work."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from model.prompt import ShotsAttend
from server.access.quotas import Quota
from server.errors import EngineNotReady, InvalidRequest, ShuttingDown
from server.limits.admission import Ticket
from server.telemetry.metrics import Metrics
from server.telemetry.stages import NO_STAGES, current
from server.wire import Admitted, FinishReason, Scored, Token

# errors of requests that the engine refused, before any work
REFUSALS = (EngineNotReady, ShuttingDown, InvalidRequest)

logger = logging.getLogger(__name__)


class RequestRecord(AbstractContextManager["RequestRecord"]):
    """Records the cost of a request from its arrival to its end; a context manager around the engine's work.

    The request ends with `finish_reason`, with "error" after an exception, or with "abort" if it is cancelled. A record
    without a ticket is for the server's own work: its tokens and media are counted, but not as a finished request.
    """

    def __init__(
        self,
        request_id: str,
        metrics: Metrics,
        ticket: Ticket | None = None,
        quota: Quota | None = None,
        path: str = "",
    ) -> None:
        self.request_id = request_id
        self.path = path
        self.arrived = time.monotonic()
        self.priority = 0
        self.client = "" if ticket is None else ticket.client
        self.finish_reason: FinishReason = "stop"
        self.num_shots: int | None = None
        self.strategy: str | None = None  # that selected the shots from a support set
        self.details: dict[str, Any] = {}  # fields that a route adds to `usage.fewshot_details`
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.accepted_proposals = 0
        self.rejected_proposals = 0
        self.media = 0
        self.media_deduplicated = 0
        self.cached_tokens = 0
        self.media_encoded = 0
        self.media_cached: int | None = None  # None: the engine has reported nothing about caches
        self._metrics = metrics
        self._ticket = ticket
        self._quota = quota
        self._stages = NO_STAGES if ticket is None else current.get()
        self._is_admitted = False
        self._queue_seconds = 0.0
        self._first_token: float | None = None
        self._last_token: dict[int, float] = {}

    def begin_prompt(
        self,
        num_tokens: int,
        media: Sequence[bytes] = (),
        shots_attend: ShotsAttend = "previous",
        *,
        num_candidate_tokens: int | None = None,
    ) -> str:
        """Count a prompt that the engine is about to compute, and its media by digest; note another form.

        `num_candidate_tokens`: those of all candidates that are about to be scored after the prompt. Returns a unique id
        for the engine's request: a client may send the same `request_id` twice.
        """
        if num_candidate_tokens is not None:
            for name, number in (("prompts", 1), ("candidate_tokens", num_candidate_tokens)):
                self.details[name] = self.details.get(name, 0) + number
        if shots_attend != "previous":
            self.details["shots_attend"] = shots_attend
        self.prompt_tokens += num_tokens
        self.media += len(media)
        self.media_deduplicated += len(media) - len(set(media))
        return f"{self.request_id}-{uuid.uuid4().hex[:8]}"

    def classified(self, method: str) -> None:
        """Count a classification, or the answer to a question of a decision, by the method that was used."""
        if self._ticket is not None:
            self._metrics.count_classification(method)

    def admitted(self, event: Admitted | Scored, num_tokens: int) -> None:
        """Count the engine's cache hits for a prompt of `num_tokens`, whose first step has begun."""
        self.cached_tokens += event.cached_tokens
        self.media_encoded += event.media_encoded
        self.media_cached = (self.media_cached or 0) + event.media_cached
        self._metrics.prompt_tokens_cached.inc(event.cached_tokens)
        self._metrics.count_media(event.media_encoded, event.media_cached)
        if not self._is_admitted and self._ticket is not None:
            self._metrics.request_queue_time.observe(event.queue_seconds)
            self._queue_seconds = event.queue_seconds
            first_step = self.arrived + event.queue_seconds
            self._stages.begin("prefill" if isinstance(event, Admitted) else "compute", at=first_step)
        self.begun(num_tokens)

    def begun(self, num_tokens: int) -> None:
        """Count the tokens of a prompt that the engine has begun, or answered without reporting that it began."""
        self._is_admitted = True
        self._stages.begin("compute", at=self.arrived)  # ignored after `admitted`
        self._metrics.prompt_tokens.inc(num_tokens)
        if self._ticket is not None:
            self._ticket.started()

    def token(self, index: int, event: Token) -> None:
        """Count a token of the answer `index`."""
        now = time.monotonic()
        self.completion_tokens += 1
        self.accepted_proposals += event.is_proposed
        self.rejected_proposals += event.num_rejected
        self._metrics.generation_tokens.inc()
        if self._first_token is None:
            self._first_token = now - self.arrived
            self._metrics.time_to_first_token.observe(self._first_token)
            self._stages.begin("decode", at=now)
        if (last := self._last_token.get(index)) is not None:
            self._metrics.inter_token_latency.observe(now - last)
        self._last_token[index] = now

    def usage(self) -> dict[str, Any]:
        """Return the usage in OpenAI's shape, with `fewshot_details`.

        Media by cache are included only if the engine reports them, and proposed tokens only if there were any.
        """
        by_cache = {"media_encoded": self.media_encoded, "media_cached": self.media_cached}
        proposals = {
            "accepted_prediction_tokens": self.accepted_proposals,
            "rejected_prediction_tokens": self.rejected_proposals,
        }
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **({"completion_tokens_details": proposals} if any(proposals.values()) else {}),
            "fewshot_details": {
                "media": self.media,
                **(by_cache if self.media_cached is not None else {}),
                "media_deduplicated": self.media_deduplicated,
                **self.details,
            },
        }

    def __enter__(self) -> RequestRecord:
        self._stages.begin("queue")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.finish_reason = "error" if isinstance(error, Exception) else "abort"
        is_refused = not self._is_admitted and isinstance(error, REFUSALS)
        if self._quota is not None and not is_refused:
            candidate_tokens = self.details.get("candidate_tokens", 0)
            self._quota.count("tokens", self.prompt_tokens + candidate_tokens + self.completion_tokens)
            self._quota.count("media", self.media)
        if self._ticket is not None:
            self._finish()

    def _finish(self) -> None:
        seconds = time.monotonic() - self.arrived
        self._metrics.count_finished(self.finish_reason)
        if self._is_admitted:
            self._metrics.request_prompt_tokens.observe(self.prompt_tokens)
            self._metrics.request_media.observe(self.media)
            if self.num_shots is not None:
                self._metrics.request_shots.observe(self.num_shots)
            if self.strategy is not None:
                self._metrics.count_selection(self.strategy)
        if self.finish_reason in ("stop", "length"):
            self._metrics.e2e_request_latency.observe(seconds)
            if self._first_token is not None:
                self._metrics.request_generation_tokens.observe(self.completion_tokens)
                self._metrics.request_prefill_time.observe(max(self._first_token - self._queue_seconds, 0.0))
                self._metrics.request_decode_time.observe(
                    max(self._last_token.values()) - self.arrived - self._first_token
                )
        facts = {
            "request_id": self.request_id,
            "path": self.path,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "media": self.media,
            "completion_tokens": self.completion_tokens,
            "first_token_seconds": None if self._first_token is None else round(self._first_token, 4),
            "seconds": round(seconds, 4),
        }
        logger.info("request finished", extra=facts)
        self._stages.begin("answer", at=max(self._last_token.values(), default=None))
        self._stages.describe({**facts, "cached_tokens": self.cached_tokens, "media_encoded": self.media_encoded})
