"""A request that the engine answers whole, in one reply or several: its ticket, its count and its line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from server.api.admission import Ticket
from server.api.services import Services
from server.engine.wire import FinishReason

Reply = TypeVar("Reply")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Whose requests these are to the engine. `started` is called when it has answered the first of them, `ended` with
    the reason when no more are to come."""

    request_id: str
    arrived: float
    priority: int = 0
    started: Callable[[], None] = lambda: None
    ended: Callable[[FinishReason], None] = lambda reason: None


def asking_of(request: Request, services: Services, ticket: Ticket, priority: int, accepted: float) -> Asking:
    request_id = request.state.request_id

    def ended(reason: FinishReason) -> None:
        seconds = time.monotonic() - accepted
        services.metrics.finished(reason)
        if reason == "stop":
            services.metrics.e2e_request_latency.observe(seconds)
        extra = {"request_id": request_id, "finish_reason": reason, "seconds": round(seconds, 4)}
        logger.info("request finished", extra=extra)

    return Asking(request_id=request_id, arrived=accepted, priority=priority, started=ticket.started, ended=ended)


async def replied(asking: Asking, work: Coroutine[Any, Any, Reply]) -> Reply:
    """Until the engine has answered, it waits as a prompt does that was not begun."""
    reason: FinishReason = "abort"
    try:
        found = await work
        reason = "stop"
        asking.started()
        return found
    except Exception:
        reason = "error"
        raise
    finally:
        asking.ended(reason)
