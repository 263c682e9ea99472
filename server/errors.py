"""The errors that a request may end with, as a tree; each class has an HTTP status, a type and a code.

    ServerError                      500  an internal error
    ├── InvalidRequest               400  the request cannot be served as it is
    │   ├── InvalidMedia             400  the bytes are not a readable image or video, or exceed a limit
    │   │   └── MediaNotFetched      400  the URL did not return an image or video
    │   ├── MediaUrlRefused          400  the settings do not permit this URL
    │   ├── ContextLengthExceeded    400  prompt and max_tokens exceed the model's context
    │   ├── TooManyExamples          400  the support set would have more examples than permitted
    │   ├── UnsupportedParameter     422  the server does not implement a field, a part or a value
    │   ├── UnsupportedMediaType     415  the route does not accept a body of this type
    │   ├── BodyTimeout              408  the body did not arrive in time
    │   └── BodyTooLarge             413  the body exceeds the limit
    ├── Unauthorized                 401  the API key is missing or wrong
    ├── NotFound                     404  no resource has this id
    │   ├── ModelNotFound            404  another model is served
    │   ├── MediaNotFound            404  no stored image or video has this id
    │   ├── SupportSetNotFound       404  no support set has this id or name, or this version; or it has expired
    │   ├── ExampleNotFound          404  the support set has no example with this id
    │   └── EvaluationNotFound       404  no evaluation has this id
    ├── Conflict                     409  the request contradicts the present state
    │   ├── MediaInUse                    a support set refers to the media item
    │   ├── NameTaken                     another support set has this name
    │   ├── VersionConflict               the support set's version is not the expected one
    │   └── IdempotencyConflict           the key was sent before with a different request
    ├── DeadlineExceeded             504  the request was not finished by its deadline
    ├── Unavailable                  503  the same request may succeed later; with Retry-After
    │   ├── Overloaded                    the queue, or the memory for bodies, is full
    │   │   └── ClientOverShare      429  this client has its share of the queue, or of the memory
    │   ├── StorageUnavailable            the media store cannot be read or written
    │   ├── ShuttingDown                  the server received SIGTERM
    │   ├── EngineNotReady                the worker is loading or restarting
    │   ├── EngineDied                    the worker died while it ran this request
    │   │   └── EngineStalled             the worker hung while it had this request, and was killed
    │   └── DatabaseUnavailable           the database does not respond, or has too many writers
    └── EngineFailed                 500  the engine could not finish this request

A field is honoured or refused, never ignored. Messages are for clients: they contain no paths and no prompt text.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, ClassVar


class ServerError(Exception):
    """An error with a message for the client; `param` is the path of the field at fault."""

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
        # OpenAI's clients obey this header; without it they also retry errors that are permanent
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
        # the rest of the body is unread, so the connection cannot carry another request
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


class DeadlineExceeded(ServerError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class Unavailable(ServerError):
    """An error that may pass: the response names the seconds to wait before a retry."""

    status = 503
    type = "unavailable_error"
    code = "unavailable"
    is_retryable = True
    retry_after: int = 1

    def headers(self) -> dict[str, str]:
        return super().headers() | {"Retry-After": str(self.retry_after)}


class Overloaded(Unavailable):
    """A refusal with the seconds to wait. `closes`: the body is unread, so the connection can carry no other request."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after: int = 1, closes: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self._closes = closes

    def headers(self) -> dict[str, str]:
        return super().headers() | ({"Connection": "close"} if self._closes else {})


class ClientOverShare(Overloaded):
    status = 429
    type = "rate_limit_error"
    code = "client_over_share"


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
    # this request may have killed the worker: clients must not retry it automatically
    is_retryable = False


class EngineStalled(EngineDied):
    code = "engine_stalled"


class DatabaseUnavailable(Unavailable):
    code = "database_unavailable"


class EngineFailed(ServerError):
    code = "engine_failed"


def http_error_body(status: int, detail: str) -> dict[str, Any]:
    """Return the error body for a request that the web framework refuses: an unknown route or a wrong method."""
    kind = "not_found_error" if status == 404 else "invalid_request_error" if status < 500 else "server_error"
    code = HTTPStatus(status).name.lower()
    return {"error": {"message": detail, "type": kind, "param": None, "code": code}}
