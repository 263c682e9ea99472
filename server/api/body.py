"""Reading a request's body with a limit that holds while it arrives, whatever its headers promise."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.errors import BodyTimeout, BodyTooLarge
from server.settings import Settings


async def read_body(request: Request, settings: Settings) -> bytes:
    limit = settings.max_body_bytes
    _check_size(int(request.headers.get("content-length", 0)), limit)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for piece in request.stream():
                _check_size(len(body) + len(piece), limit)
                body += piece
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {settings.body_timeout:g} seconds") from None
    return bytes(body)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise BodyTooLarge(f"the body has {size} bytes or more, the limit is {limit}")


class JSONResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)
