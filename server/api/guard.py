"""Middleware before every route: it checks the API key, and gives each request an id for its answer and the logs.

Pure ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.body import JSONResponse
from server.errors import Unauthorized

# A browser sends no key when it opens a page. The document and its page are the same for every server of a version: they
# hold nothing of its model, its data or its settings.
DOCS_PATHS = frozenset(
    {"/openapi.json", "/docs", "/docs/docs.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"}
)
# Probes and scrapers carry no key either.
OPEN_PATHS = frozenset({"/health/live", "/health/ready", "/metrics"}) | DOCS_PATHS
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Guard:
    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else _digest(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        if self._is_allowed(scope["path"], headers):
            await self._app(scope, receive, send_with_id)
        else:
            error = Unauthorized("a valid API key is needed: Authorization: Bearer KEY")
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send_with_id)

    def _is_allowed(self, path: str, headers: Headers) -> bool:
        if self._key is None or path in OPEN_PATHS:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # digests have one length, so the time taken reveals nothing about the key
        return scheme.lower() == "bearer" and hmac.compare_digest(_digest(key.strip()), self._key)


def _request_id(headers: Headers) -> str:
    """Return the client's request id, if a log line and a header can carry it, or a new one."""
    request_id = headers.get("x-request-id", "")
    return request_id if REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
