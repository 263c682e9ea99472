"""Responses of the API: the head of an answer, and bodies that are written in pieces.

Between two pieces, the connection waits for its client. Without pieces, a server holds the body of each client that sends
requests and reads no response, and has already released the request's ticket. A body that is in memory is counted until
the client has read it. A download is read while it is sent.
"""

from __future__ import annotations

import asyncio
import mimetypes
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.access.pages import SAFE_METHODS
from server.access.roles import needed_role
from server.limits.admission import Ticket
from server.limits.deadline import Deadline
from server.schemas.base import TrackedRequest
from server.served_model import ServedModel
from server.telemetry.request_record import RequestRecord

JSON = "application/json"
# true in the scope of a request whose response is sent without its body
IS_HEAD = "is_head"
# bytes per write; as much may wait in a connection
PIECE = 2**16


class WholeResponse(Response):
    """A response from one body. A large body counts among the bytes of the request's ticket.

    If bodies of too many bytes are held, sending it raises `Overloaded` or `ClientOverShare`, before the status is sent.
    But a request that may have changed something is not refused any more, because its client would repeat it.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ticket: Ticket | None = scope["state"].get("ticket")  # a refused request has none
        if ticket is None or len(self.body) <= PIECE:
            if ticket is not None:
                ticket.answered()
            await super().__call__(scope, receive, send)
            return
        if _changes_nothing(scope):
            ticket.hold(len(self.body), is_unread=False)
        else:
            ticket.count(len(self.body))
        ticket.answered()
        deadline: Deadline = scope["state"]["deadline"]
        deadline.end()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self._pieces():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _pieces(self) -> Iterator[memoryview]:
        whole = memoryview(self.body)
        return (whole[start : start + PIECE] for start in range(0, len(whole), PIECE))


class Download(StreamingResponse):
    """A response whose pieces are read while it is sent, so that an unread one takes the memory of one piece."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        state["ticket"].answered()
        state["deadline"].end()
        if scope.get(IS_HEAD):  # no client sets the pace at which pieces would be read
            self.body_iterator = read_in_threads(iter(()))
        await super().__call__(scope, receive, send)


async def download(
    pieces: Iterator[bytes],
    media_type: str,
    headers: Mapping[str, str],
    in_thread: Callable[..., Awaitable[bytes | None]] = asyncio.to_thread,
) -> Download:
    """Return a download of pieces that threads read. The first is read now, so that an error has its own status."""
    first = await in_thread(next, pieces, b"") or b""
    return Download(read_in_threads(chain([first], pieces), in_thread), media_type=media_type, headers=headers)


def is_known(tag: str, request: Request) -> bool:
    """Return whether the client has the content with this `ETag`, so that a 304 is enough."""
    known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    return tag in known or "*" in known


async def file_response(path: Path, request: Request, headers: Mapping[str, str]) -> Response:
    """Return a file of this server, whole, or a 304. A `Range` has no effect: a response may always be the whole."""
    stat = await asyncio.to_thread(path.stat)
    headers = {**headers, "ETag": f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'}
    if is_known(headers["ETag"], request):
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(stat.st_size)
    return await download(_pieces_of(path), mimetypes.guess_type(path)[0] or "text/plain", headers)


def _pieces_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


async def read_in_threads(
    pieces: Iterator[bytes], in_thread: Callable[..., Awaitable[bytes | None]] = asyncio.to_thread
) -> AsyncIterator[bytes]:
    """Yield pieces, each of which a thread reads when the connection takes it."""
    while (piece := await in_thread(next, pieces, None)) is not None:
        yield piece


def _changes_nothing(scope: Scope) -> bool:
    method: str = scope["method"]
    # a request without a route was refused
    if method in SAFE_METHODS or (route := scope.get("route")) is None:
        return True
    return needed_role(method, route.path) == "inference"


class JSONResponse(WholeResponse):
    media_type = JSON

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def response_head(
    kind: str, prefix: str, fields: TrackedRequest, record: RequestRecord, model: ServedModel
) -> dict[str, Any]:
    """Return the first fields of an answer of the engine: its kind, time and model, and an id with the request's own id."""
    return {
        "id": f"{prefix}-{fields.request_id or record.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": model.name,
    }
