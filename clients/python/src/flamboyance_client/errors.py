"""Everything this package raises on purpose, in one tree:

    FlamboyanceError
    ├── TransportError        no reply: the connection failed or broke off
    │   ├── NotConnected      no connection could be made, so nothing was sent
    │   └── TimedOut          connected, but no reply in the time allowed
    ├── ApiError              the server answered with an error, see `status`, `type`, `param` and `code`
    │   ├── BadRequest        400, 413, 415, 422 and other 4xx: the request itself is at fault
    │   ├── NotAuthorised     401, 403
    │   ├── NotFound          404: no such model, image or route
    │   ├── Unavailable       429, 503: refused for now, `retry_after` says for how long if the server did
    │   ├── ServerFault       any other 5xx
    │   └── StreamFailed      the reply had begun well and then carried an error event
    └── UnexpectedReply       the reply is not what the server's documentation promises, or ended too early

A mistake in a call (an unknown option, an unreadable file) raises Python's own TypeError, ValueError or OSError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class FlamboyanceError(Exception):
    pass


class TransportError(FlamboyanceError):
    pass


class NotConnected(TransportError):
    pass


class TimedOut(TransportError):
    pass


class UnexpectedReply(FlamboyanceError):
    pass


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """What the server said: its error object, and what the reply's head added."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | int | None = None
    status: int | None = None
    request_id: str | None = None
    retry_after: float | None = None


class ApiError(FlamboyanceError):
    def __init__(self, refusal: Refusal) -> None:
        where = f"{refusal.status}: " if refusal.status is not None else ""
        super().__init__(where + refusal.message)
        self.message = refusal.message
        self.type = refusal.type
        self.param = refusal.param
        self.code = refusal.code
        self.status = refusal.status
        self.request_id = refusal.request_id
        self.retry_after = refusal.retry_after


class BadRequest(ApiError):
    pass


class NotAuthorised(ApiError):
    pass


class NotFound(ApiError):
    pass


class Unavailable(ApiError):
    pass


class ServerFault(ApiError):
    pass


class StreamFailed(ApiError):
    pass


KINDS: Mapping[int, type[ApiError]] = {
    401: NotAuthorised,
    403: NotAuthorised,
    404: NotFound,
    429: Unavailable,
    503: Unavailable,
}


def kind_of(status: int) -> type[ApiError]:
    return KINDS.get(status, ServerFault if status >= 500 else BadRequest)


def error_fields(body: Any) -> dict[str, Any]:
    """The error object of a body, or of one event of a stream; {} where there is none."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict):
        return {}
    known = {name: error.get(name) for name in ("type", "param", "code")}
    return {"message": str(error.get("message") or "no message"), **known}
