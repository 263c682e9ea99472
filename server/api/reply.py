"""A request that the engine answers whole, in one reply: its ticket, its count and its line in the log."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from server.engine.wire import FinishReason
from server.fewshot.classification import Asking

Reply = TypeVar("Reply")


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
