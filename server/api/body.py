"""Reads request bodies: a limit of size holds while a body arrives, whatever its headers announce."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.api.services import Services
from server.errors import BodyTimeout, BodyTooLarge, InvalidRequest
from server.schemas.base import ModelRequest, PrioritizedRequest, SchemaType, read
from server.settings import Settings


async def read_request(
    schema: type[SchemaType], request: Request, services: Services, empty: bytes = b""
) -> SchemaType:
    """Read and validate a JSON body; `empty` stands for one without bytes. Raises `InvalidRequest`, `ModelNotFound`."""
    fields = read(schema, await read_body(request, services.settings) or empty)
    if isinstance(fields, ModelRequest):
        services.check_model(fields.model)
    if isinstance(fields, PrioritizedRequest):
        services.check_priority(fields.priority)
    return fields


def read_query(schema: type[SchemaType], request: Request) -> SchemaType:
    """Validate a query string as `read_request` validates a body; a repeated name is refused. Raises `InvalidRequest`."""
    query = request.query_params
    if repeated := next((name for name in query if len(query.getlist(name)) > 1), None):
        raise InvalidRequest(f"{repeated[:64]}: given more than once", param=repeated[:64])
    return read(schema, msgspec.json.encode(dict(query)))


async def read_body(request: Request, settings: Settings) -> bytes:
    """Raises `BodyTooLarge`, `BodyTimeout`."""
    return b"".join([piece async for piece in stream_body(request, settings)])


async def stream_body(request: Request, settings: Settings) -> AsyncGenerator[bytes, None]:
    """Yield the body in pieces, within the limits of size and time. Raises `BodyTooLarge`, `BodyTimeout`."""
    limit, size = settings.max_body_bytes, 0
    _check_size(int(request.headers.get("content-length", 0)), limit)
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for piece in request.stream():
                size += len(piece)
                _check_size(size, limit)
                yield piece
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {settings.body_timeout:g} seconds") from None


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BodyTooLarge(f"the body has {size} bytes or more, the limit is {limit}")


class JSONResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)
