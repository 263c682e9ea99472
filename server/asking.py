"""Who asks the engine for what it answers whole, in one reply or several: told when it has begun, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from server.wire import FinishReason

Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Whose requests these are to the engine. `started` is called when it has answered the first of them, `ended` with
    the reason when no more are to come."""

    request_id: str
    arrived: float
    priority: int = 0
    started: Callable[[], None] = lambda: None
    ended: Callable[[FinishReason], None] = lambda reason: None


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
