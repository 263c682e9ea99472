"""Reads request bodies: the size limit is enforced while a body arrives, whatever its headers declare."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from operator import itemgetter
from typing import BinaryIO

import msgspec
from fastapi.routing import APIRoute
from starlette.requests import Request

from server.access.callers import Caller
from server.access.quotas import Quota
from server.access.roles import may
from server.api.guard import takes_any_query
from server.api.responses import JSON
from server.api.services import Services
from server.api.sse import unless_disconnected
from server.errors import BodyTimeout, BodyTooLarge, Forbidden, InvalidRequest, UnsupportedMediaType
from server.limits.admission import Ticket
from server.schemas.base import ModelRequest, PrioritizedRequest, Schema, SchemaType, TimedRequest, read
from server.schemas.separators import has_at_least
from server.settings import Settings
from server.telemetry.stages import current

# the size in bytes from which reading a body takes some milliseconds
LARGE_BODY = 2**20
# the size, and the numbers of separators and of escapes, from which parsing takes as long
SLOW_BODY, MANY = 2**22, {b":": 2**12, b",": 2**16, b"[": 2**14, b"{": 2**14, b"\\": 2**16}
# bytes of a body per write to a file
WRITE_BYTES = 2**20


async def read_request(
    schema: type[SchemaType], request: Request, services: Services, empty: bytes = b""
) -> SchemaType:
    """Read the fields of a request, and check its model and its priority, if it has them.

    Raises what `read_json` raises, `Forbidden` and `ModelNotFound`.
    """
    fields, _ = await read_json(schema, request, services, empty)
    if isinstance(fields, ModelRequest) and fields.model not in (None, services.model.name):
        raise services.model_not_found(str(fields.model))
    if isinstance(fields, TimedRequest):
        request.state.deadline.shorten(fields.timeout)
    if isinstance(fields, PrioritizedRequest) and fields.priority < 0:
        _check_priority(fields.priority, request.state.caller, services.settings)
    current.get().begin("prepare")
    return fields


def _check_priority(priority: int, caller: Caller, settings: Settings) -> None:
    """Check that a request may have a negative priority. Raises `InvalidRequest` and `Forbidden`."""
    if not settings.allow_negative_priority:
        raise InvalidRequest(
            f"priority is {priority}, this server does not accept priorities below 0", param="priority"
        )
    if caller.tenant:
        raise Forbidden(f"priority is {priority}: below 0 it needs a key of the default tenant", param="priority")
    if not may(caller.role, "manage"):
        raise Forbidden(f"priority is {priority}: below 0 it needs a key with the role manage", param="priority")


async def read_json(
    schema: type[SchemaType], request: Request, services: Services, empty: bytes = b""
) -> tuple[SchemaType, bytes]:
    """Read and validate a JSON body, and return the fields and the body; `empty` replaces a body without bytes.

    Bodies with many values are validated one at a time in a thread, with a pause after each of a client. Other types
    are refused, because a page of another site can send them without a preflight request. Raises `InvalidRequest`,
    `UnsupportedMediaType`, `ClientDisconnect` and what `stream_body` raises.
    """
    declared, body = content_type(request), await read_body(request, services.settings)
    if body and declared != JSON:
        message = f"a body of type {declared[:64]!r}: send JSON with the header Content-Type: {JSON}"
        raise UnsupportedMediaType(message, param="Content-Type")
    body = body or empty
    if len(body) < SLOW_BODY and not any(has_at_least(number, mark, body) for mark, number in MANY.items()):
        return read(schema, body), body
    return await unless_disconnected(request.receive, services.parsing.run(read, schema, body)), body


def read_query(schema: type[SchemaType], request: Request) -> SchemaType:
    """Validate a query string as `read_request` validates a body; a repeated name is refused. Raises `InvalidRequest`."""
    query = request.query_params.multi_items()
    name, number = max(Counter(name for name, _ in query).items(), key=itemgetter(1), default=("", 0))
    if number > 1:
        raise InvalidRequest(f"{name[:64]}: set more than once", param=name[:64])
    return read(schema, msgspec.json.encode(dict(query)), "the query string")


async def check_parameters(request: Request) -> None:
    """Refuse query parameters on a route that describes none: the other routes read theirs. Raises `InvalidRequest`."""
    route: APIRoute = request.scope["route"]
    described = (route.openapi_extra or {}).get("parameters", ())
    if not (takes_any_query(request.scope["path"]) or any(parameter["in"] == "query" for parameter in described)):
        read_query(Schema, request)


async def read_body(request: Request, settings: Settings) -> bytes:
    """Return the whole body. Raises what `stream_body` raises."""
    pieces = [piece async for piece in stream_body(request, settings)]
    if sum(map(len, pieces)) < LARGE_BODY:
        return b"".join(pieces)
    return await asyncio.to_thread(b"".join, pieces)


def content_type(request: Request) -> str:
    """Return the declared type of the body without its parameters; '' if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def stream_body(request: Request, settings: Settings, *, is_import: bool = False) -> AsyncGenerator[bytes, None]:
    """Yield the body in pieces, within the limits of size and time; after the last piece, the request waits in the queue.

    A large body pauses for other requests. An import has a larger limit of size, and a longer one of time in proportion; it
    is not held in memory, and does not wait here. Raises `BodyTooLarge`, `BodyTimeout` and what `Ticket.wait` raises.
    """
    ticket: Ticket = request.state.ticket
    quota: Quota | None = request.state.caller.quota
    limit = settings.max_import_bytes if is_import else settings.max_body_bytes
    seconds = settings.body_timeout * max(limit / settings.max_body_bytes, 1)
    size, received = int(request.headers.get("content-length", 0)), 0
    stream, deadline = request.stream(), asyncio.get_running_loop().time() + seconds
    while size <= limit:
        try:
            async with asyncio.timeout_at(deadline):
                piece = await anext(stream)
        except TimeoutError:
            raise BodyTimeout(f"the body did not arrive within {seconds:g} seconds") from None
        if not piece:  # the end of the body
            if not is_import:
                ticket.wait()
            return
        if quota is not None:
            quota.count("bytes", len(piece))
        if not is_import:
            ticket.hold(len(piece))
        yield piece
        received += len(piece)
        size = max(size, received)
        if received > LARGE_BODY and (pause := ticket.pause(len(piece))):
            await asyncio.sleep(pause)
            deadline += pause
    raise BodyTooLarge(f"the body has {size} bytes or more, the limit is {limit}")


async def spool_body(request: Request, settings: Settings, file: BinaryIO) -> str:
    """Write the body of an import to a file, wait in the queue, and return the body's SHA-256.

    Raises what `stream_body` raises, and `OSError`.
    """
    ticket: Ticket = request.state.ticket
    digest, unwritten = hashlib.sha256(), bytearray()

    def write(data: bytes) -> None:
        digest.update(data)
        file.write(data)

    async with aclosing(stream_body(request, settings, is_import=True)) as pieces:
        async for piece in pieces:
            unwritten += piece
            if len(unwritten) >= WRITE_BYTES:
                await asyncio.to_thread(write, bytes(unwritten))
                unwritten.clear()
    await asyncio.to_thread(write, bytes(unwritten))
    await asyncio.to_thread(file.flush)
    ticket.wait()
    return digest.hexdigest()
