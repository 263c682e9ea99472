"""Reading a request's body with a limit that holds while it arrives, whatever its headers promise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.api.services import Services
from server.errors import BodyTimeout, BodyTooLarge
from server.schemas.base import ModelRequest, SchemaType, read
from server.settings import Settings


async def read_request(
    schema: type[SchemaType], request: Request, services: Services, empty: bytes = b""
) -> SchemaType:
    """Read and validate a JSON body; `empty` stands for one without bytes. Raises `InvalidRequest`, `ModelNotFound`."""
    fields = read(schema, await read_body(request, services.settings) or empty)
    if isinstance(fields, ModelRequest):
        services.check_model(fields.model)
    return fields


async def read_body(request: Request, settings: Settings) -> bytes:
    body = bytearray()
    async for piece in stream_body(request, settings):
        body += piece
    return bytes(body)


async def stream_body(request: Request, settings: Settings) -> AsyncGenerator[bytes, None]:
    """Raises `BodyTooLarge`, `BodyTimeout`."""
    size, limit = 0, settings.max_body_bytes
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
