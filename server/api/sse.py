"""Server-sent events, and detection of disconnected clients for all responses.

In a silent stream, comment lines keep proxies from closing the connection. An error before the first event is an
ordinary response with its status; a later one is an event, and the stream still ends with [DONE].
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.services import count_failure
from server.concurrency import cancel
from server.errors import EngineFailed, ServerError
from server.limits.deadline import Deadline

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work`; if the client disconnects first, cancel it and raise `ClientDisconnect`."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        # work that fails while it is cancelled is not logged as a task whose failure was never seen
        await cancel((working, leaving))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of events. An error that ends it after its status was sent is counted as a failure of the request."""

    media_type = "text/event-stream"

    def __init__(self, bodies: AsyncGenerator[Any, None], *, keep_alive: float) -> None:
        # like starlette's own streams: without a body there is no content-length
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._bodies = bodies
        self._keep_alive = keep_alive
        self._is_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_all(Request(scope), send))
        except ClientDisconnect:
            # once the stream has begun, no other response is possible
            if not self._is_begun:
                raise

    async def _send_all(self, request: Request, send: Send) -> None:
        deadline: Deadline = request.state.deadline
        try:
            bodies = _with_keep_alives(self._bodies, self._keep_alive)
            async with deadline.limit(), aclosing(bodies):
                async for body in bodies:
                    await self._send(send, KEEP_ALIVE if body is None else event(body))
        except Exception as error:
            if not self._is_begun:
                raise
            failure = _shown(error)
            count_failure(request, failure)
            await self._send(send, event(failure.body()))
        await self._send(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        if not self._is_begun:
            self._is_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": data, "more_body": True})


def event(body: Any) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _shown(error: Exception) -> ServerError:
    """Return a `ServerError` as it is, and any other exception as an internal error."""
    if isinstance(error, ServerError):
        return error
    logger.error("a stream failed", exc_info=error)
    return EngineFailed("internal error")


async def _with_keep_alives(bodies: AsyncGenerator[Any, None], seconds: float) -> AsyncGenerator[Any, None]:
    """Yield the bodies, and None whenever there was none for `seconds`."""
    end = object()
    async with aclosing(bodies):
        while True:
            coming = asyncio.ensure_future(anext(bodies, end))
            try:
                while not (await asyncio.wait({coming}, timeout=seconds))[0]:
                    yield None
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.wait({coming})
                if not coming.cancelled():
                    coming.exception()  # once seen, it is not logged if the client leaves at the same time
            if (body := coming.result()) is end:
                return
            yield body
