"""The errors of requests, as a tree of classes; each has an HTTP status, a type and a code.

A field is honoured or refused, never ignored. Messages are for clients: they contain no paths and no prompt text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

# characters of a message or of the path of a field, which may contain a client's own names
MAX_LENGTH = 2000


class ServerError(Exception):
    """An internal error, or one of those below: a message for the client; `param` is the path of the field at fault.

    Both are shortened and have no lone surrogates, so that a refusal is a small response whatever the request was.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    is_retryable: ClassVar[bool] = False
    # the connection cannot carry another request
    closes: bool = False

    def __init_subclass__(cls, *, code: str) -> None:
        cls.code = code

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.message = _shortened(message)
        self.param = None if param is None else _shortened(param)
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        # many clients show the message alone, which must say which of several media or examples it is about
        is_one_of_several = self.param is not None and "[" in self.param and self.param not in self.message
        message = f"{self.param}: {self.message}" if is_one_of_several else self.message
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        # OpenAI's clients obey this header; without it they also retry errors that are permanent
        retry = {"X-Should-Retry": "true" if self.is_retryable else "false"}
        return {**retry, "Connection": "close"} if self.closes else retry


class InvalidRequest(ServerError, code="invalid_value"):
    """The request cannot be served as it is."""

    status = 400
    type = "invalid_request_error"


class InvalidMedia(InvalidRequest, code="invalid_media"):
    """The bytes are not a readable image or video, or exceed a limit."""


class TooManyPixels(InvalidMedia, code="too_many_pixels"):
    """The media of the request have more pixels together than permitted."""


class MediaNotFetched(InvalidMedia, code="media_not_fetched"):
    """The URL did not return an image or video."""


class MediaUrlRefused(InvalidRequest, code="media_url_refused"):
    """The settings do not permit this URL."""


class InvalidArchive(InvalidRequest, code="invalid_archive"):
    """The body is not the archive of a support set, or it is damaged or exceeds a limit."""


class ContextLengthExceeded(InvalidRequest, code="context_length_exceeded"):
    """Prompt and max_tokens exceed the model's context."""


class TooManyExamples(InvalidRequest, code="too_many_examples"):
    """The support set would have more examples than permitted."""


class TooManySupportSets(InvalidRequest, code="too_many_support_sets"):
    """The tenant of the API key has as many support sets as the key permits."""

    status = 403
    type = "permission_error"


class UnsupportedParameter(InvalidRequest, code="unsupported_parameter"):
    """The server does not implement a field, a part or a value."""

    status = 422


class UnsupportedMediaType(InvalidRequest, code="unsupported_media_type"):
    """The route does not accept a body of this type."""

    status = 415


class MethodNotAllowed(InvalidRequest, code="method_not_allowed"):
    """The route has no such method; `methods` are those that it has."""

    status = 405

    def __init__(self, message: str, methods: Iterable[str]) -> None:
        super().__init__(message)
        self._methods = sorted(methods)

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "Allow": ", ".join(self._methods)}


class BodyTimeout(InvalidRequest, code="body_timeout"):
    """The body did not arrive in time."""

    status = 408
    is_retryable = True


class BodyTooLarge(InvalidRequest, code="body_too_large"):
    """The body exceeds the limit."""

    status = 413
    closes = True  # the rest of the body is unread


class Unauthorized(ServerError, code="invalid_api_key"):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"WWW-Authenticate": "Bearer"}


class Forbidden(ServerError, code="permission_denied"):
    """The role of the API key does not permit the request."""

    status = 403
    type = "permission_error"


class HostRefused(InvalidRequest, code="host_not_allowed"):
    """The header `Host` names a host that this server is not."""

    status = 421


class OriginRefused(InvalidRequest, code="origin_not_allowed"):
    """A page of another site sent the request."""

    status = 403


class NotFound(ServerError, code="not_found"):
    """No resource has this id."""

    status = 404
    type = "not_found_error"


class ModelNotFound(NotFound, code="model_not_found"):
    """Another model is served."""


class MediaNotFound(NotFound, code="image_not_found"):
    """No stored image or video has this id."""


class NamedMediaNotFound(NotFound, code="media_not_found"):
    """No image or video of this `uuid` is in memory: it was never sent, or its data were dropped."""


class SupportSetNotFound(NotFound, code="support_set_not_found"):
    """No support set has this id or name, or this version; or it has expired."""


class ExampleNotFound(NotFound, code="example_not_found"):
    """The support set has no example with this id."""


class EvaluationNotFound(NotFound, code="evaluation_not_found"):
    """No evaluation has this id."""


class KeyNotFound(NotFound, code="key_not_found"):
    """No API key has this id."""


class Conflict(ServerError, code="conflict"):
    """The request contradicts the present state."""

    status = 409
    type = "conflict_error"


class LastKey(Conflict, code="last_key"):
    """Without this API key the server would be open."""


class MediaInUse(Conflict, code="image_in_use"):
    """A version of a support set contains the media item."""


class MediaNameTaken(Conflict, code="media_name_taken"):
    """The `uuid` was sent before with other data."""


class NameTaken(Conflict, code="name_taken"):
    """Another support set has this name."""


class VersionConflict(Conflict, code="version_conflict"):
    """The support set's version is not the expected one."""


class IdempotencyConflict(Conflict, code="idempotency_conflict"):
    """The key was sent before with a different request."""


class DeadlineExceeded(ServerError, code="deadline_exceeded"):
    """The request was not finished by its deadline."""

    status = 504
    type = "timeout_error"


class Unavailable(ServerError, code="unavailable"):
    """A repeated request may succeed later; with Retry-After."""

    status = 503
    type = "unavailable_error"
    is_retryable = True
    retry_after: int = 1

    def headers(self) -> dict[str, str]:
        return super().headers() | {"Retry-After": str(self.retry_after)}


class Overloaded(Unavailable, code="overloaded"):
    """The queue, the memory for bodies, or the processor is full. `closes`: the body is unread."""

    def __init__(self, message: str, *, retry_after: int = 1, closes: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.closes = closes


class ClientOverShare(Overloaded, code="client_over_share"):
    """This client has its share of the queue, of the memory for bodies, of the imports, evaluations or warmings."""

    status = 429
    type = "rate_limit_error"


class QuotaExceeded(Overloaded, code="quota_exceeded"):
    """The API key has used what it may use in a minute."""

    status = 429
    type = "rate_limit_error"


class ShuttingDown(Unavailable, code="shutting_down"):
    """The server received SIGTERM."""

    closes = True


class StorageUnavailable(Unavailable, code="storage_unavailable"):
    """The media store cannot be read or written."""

    retry_after = 5


class EngineNotReady(Unavailable, code="engine_not_ready"):
    """The worker is loading or restarting."""

    retry_after = 5


class EngineDied(Unavailable, code="engine_died"):
    """The worker died while it ran this request."""

    retry_after = 5
    # this request may have killed the worker: clients must not retry it automatically
    is_retryable = False


class EngineStalled(EngineDied, code="engine_stalled"):
    """The worker hung while it had this request, and was killed."""


class DatabaseUnavailable(Unavailable, code="database_unavailable"):
    """The database does not respond, accepts no further connection, or has too many writers."""


class EngineFailed(ServerError, code="engine_failed"):
    """The engine could not finish this request."""


def _shortened(text: str) -> str:
    short = text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}..."
    return short.encode(errors="replace").decode()
