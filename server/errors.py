"""Everything that can go wrong with a request, as a tree; each class says its HTTP status, type and code.

    ServerError                      500  server_error
    ├── InvalidRequest               400  the client sent something that cannot be served
    │   ├── InvalidMedia             400  bytes that are no picture we read, or break a limit
    │   ├── ContextLengthExceeded    400  prompt and max_tokens do not fit the model
    │   ├── UnsupportedParameter     422  a field, part or value that this server does not implement
    │   ├── BodyTimeout              408  the body did not arrive in time
    │   └── BodyTooLarge             413
    ├── Unauthorized                 401
    ├── NotFound                     404
    │   ├── ModelNotFound            404
    │   └── MediaNotFound            404  no image or video of this id is stored
    ├── Unavailable                  503  with Retry-After: the same request may work later
    │   ├── Overloaded                    the queue is full
    │   ├── ShuttingDown                  SIGTERM arrived
    │   ├── EngineNotReady                the worker is loading or restarting
    │   └── EngineDied                    the worker died with this request in it
    └── EngineFailed                 500  the engine gave this request up

A field is honoured or refused: nothing is ignored in silence. Messages are for the client: no paths, no prompt text.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, ClassVar


class ServerError(Exception):
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {}


class InvalidRequest(ServerError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class InvalidMedia(InvalidRequest):
    code = "invalid_media"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    status = 422
    code = "unsupported_parameter"


class BodyTimeout(InvalidRequest):
    status = 408
    code = "body_timeout"


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "body_too_large"

    def headers(self) -> dict[str, str]:
        # the rest of the body was not read: the connection cannot carry another request
        return {"Connection": "close"}


class Unauthorized(ServerError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class NotFound(ServerError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MediaNotFound(NotFound):
    code = "image_not_found"


class Unavailable(ServerError):
    status = 503
    type = "unavailable_error"
    code = "unavailable"
    retry_after: ClassVar[int] = 1

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}


class Overloaded(Unavailable):
    code = "overloaded"


class ShuttingDown(Unavailable):
    code = "shutting_down"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"Connection": "close"}


class EngineNotReady(Unavailable):
    code = "engine_not_ready"
    retry_after = 5


class EngineDied(Unavailable):
    code = "engine_died"
    retry_after = 5


class EngineFailed(ServerError):
    code = "engine_failed"


def http_error_body(status: int, detail: str) -> dict[str, Any]:
    """The same shape for what the web framework itself refuses: an unknown route, a wrong method."""
    kind = "not_found_error" if status == 404 else "invalid_request_error" if status < 500 else "server_error"
    code = HTTPStatus(status).name.lower()
    return {"error": {"message": detail, "type": kind, "param": None, "code": code}}
