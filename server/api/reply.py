"""A request that the engine answers whole, in one reply or several: its ticket, its count and its line in the log."""

from __future__ import annotations

import logging
import time

from starlette.requests import Request

from server.admission import Ticket
from server.asking import Asking
from server.services import Services
from server.wire import FinishReason

logger = logging.getLogger(__name__)


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
