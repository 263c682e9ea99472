"""Runs work in a thread to its end, whatever happens to the request meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

Result = TypeVar("Result")


async def run_to_end(
    threads: Executor,
    work: Callable[[], Result],
    ended: Callable[[float], None],
    clock: Callable[[], float] = time.thread_time,
) -> Result:
    """Return the result of work in a thread. When the work has ended, `ended` is called with its seconds by the clock.

    Work that is cancelled while it waits for a thread does not run. Once begun, it continues, and `ended` is called only at
    its end: otherwise a client that leaves again and again would have all threads.
    """
    seconds, is_refused = 0.0, False

    def measured() -> Result:
        nonlocal seconds
        if is_refused:
            raise asyncio.CancelledError
        begun = clock()
        try:
            return work()
        finally:
            seconds = clock() - begun

    def end(running: asyncio.Future[Result]) -> None:
        if not running.cancelled():
            running.exception()  # it is known, even if its request has left
        ended(seconds)

    try:
        submitted = threads.submit(measured)
    except BaseException:
        is_refused = True  # the executor may have queued the work before it failed to start a thread
        ended(0.0)
        raise
    running = asyncio.wrap_future(submitted)
    running.add_done_callback(end)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        submitted.cancel()  # unless it has begun
        raise
