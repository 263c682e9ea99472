"""Everything that can go wrong with a request, as a tree; each class says its HTTP status, type and code.

    ServerError                      500  server_error
    ├── InvalidRequest               400  the client sent something that cannot be served
    │   ├── InvalidMedia             400  bytes that are no picture we read, or break a limit
    │   │   └── MediaNotFetched      400  its URL did not lead to a picture
    │   ├── MediaUrlRefused          400  a URL that this server does not fetch from
    │   ├── ContextLengthExceeded    400  prompt and max_tokens do not fit the model
    │   ├── TooManyExamples          400  more than one support set may hold
    │   ├── UnsupportedParameter     422  a field, part or value that this server does not implement
    │   ├── UnsupportedMediaType     415  a body of a kind that this route does not read
    │   ├── BodyTimeout              408  the body did not arrive in time
    │   └── BodyTooLarge             413
    ├── Unauthorized                 401
    ├── NotFound                     404
    │   ├── ModelNotFound            404
    │   ├── MediaNotFound            404  no image or video of this id is stored
    │   ├── SupportSetNotFound       404  no support set of this id or name, or no such version; expired ones too
    │   ├── ExampleNotFound          404
    │   └── EvaluationNotFound       404
    ├── Conflict                     409
    │   ├── MediaInUse                    a support set shows it
    │   ├── NameTaken                     another support set has this name
    │   ├── VersionConflict               the support set is at another version than was expected
    │   └── IdempotencyConflict           the key was sent with another request
    ├── Unavailable                  503  with Retry-After: the same request may work later
    │   ├── Overloaded                    the queue is full
    │   ├── StorageUnavailable            the disk or the store behind it does not work
    │   ├── ShuttingDown                  SIGTERM arrived
    │   ├── EngineNotReady                the worker is loading or restarting
    │   ├── EngineDied                    the worker died with this request in it
    │   └── DatabaseUnavailable           it does not answer, or too many write at once
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
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        # clients of OpenAI's API heed it; by themselves they would also repeat what fails again
        return {"X-Should-Retry": "true" if self.is_retryable else "false"}


class InvalidRequest(ServerError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class InvalidMedia(InvalidRequest):
    code = "invalid_media"


class MediaNotFetched(InvalidMedia):
    code = "media_not_fetched"


class MediaUrlRefused(InvalidRequest):
    code = "media_url_refused"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class TooManyExamples(InvalidRequest):
    code = "too_many_examples"


class UnsupportedParameter(InvalidRequest):
    status = 422
    code = "unsupported_parameter"


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class BodyTimeout(InvalidRequest):
    status = 408
    code = "body_timeout"
    is_retryable = True


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "body_too_large"

    def headers(self) -> dict[str, str]:
        # the rest of the body was not read: the connection cannot carry another request
        return super().headers() | {"Connection": "close"}


class Unauthorized(ServerError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"WWW-Authenticate": "Bearer"}


class NotFound(ServerError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MediaNotFound(NotFound):
    code = "image_not_found"


class SupportSetNotFound(NotFound):
    code = "support_set_not_found"


class ExampleNotFound(NotFound):
    code = "example_not_found"


class EvaluationNotFound(NotFound):
    code = "evaluation_not_found"


class Conflict(ServerError):
    status = 409
    type = "conflict_error"
    code = "conflict"


class MediaInUse(Conflict):
    code = "image_in_use"


class NameTaken(Conflict):
    code = "name_taken"


class VersionConflict(Conflict):
    code = "version_conflict"


class IdempotencyConflict(Conflict):
    code = "idempotency_conflict"


class Unavailable(ServerError):
    status = 503
    type = "unavailable_error"
    code = "unavailable"
    is_retryable = True
    retry_after: ClassVar[int] = 1

    def headers(self) -> dict[str, str]:
        return super().headers() | {"Retry-After": str(self.retry_after)}


class Overloaded(Unavailable):
    code = "overloaded"


class ShuttingDown(Unavailable):
    code = "shutting_down"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"Connection": "close"}


class StorageUnavailable(Unavailable):
    code = "storage_unavailable"
    retry_after = 5


class EngineNotReady(Unavailable):
    code = "engine_not_ready"
    retry_after = 5


class EngineDied(Unavailable):
    code = "engine_died"
    retry_after = 5
    # it may be this request that kills: whoever sends it again shall do so knowingly
    is_retryable = False


class DatabaseUnavailable(Unavailable):
    code = "database_unavailable"


class EngineFailed(ServerError):
    code = "engine_failed"


def http_error_body(status: int, detail: str) -> dict[str, Any]:
    """The same shape for what the web framework itself refuses: an unknown route, a wrong method."""
    kind = "not_found_error" if status == 404 else "invalid_request_error" if status < 500 else "server_error"
    code = HTTPStatus(status).name.lower()
    return {"error": {"message": detail, "type": kind, "param": None, "code": code}}
