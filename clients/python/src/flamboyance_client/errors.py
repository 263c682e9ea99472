"""The errors that this package raises form one tree.

    FlamboyanceError
    ├── TransportError        no reply: the connection failed or was lost
    │   ├── NotConnected      no connection could be made, so nothing was sent
    │   └── TimedOut          connected, but no reply in the time allowed
    ├── ApiError              the server answered with an error, see `status`, `type`, `param` and `code`
    │   ├── BadRequest        400, 413, 415, 422 and other 4xx: the request is invalid
    │   ├── NotAuthorised     401: no valid key; 403: the server, or a limit of the key, does not permit the request
    │   ├── NotFound          404: no such model, image or route
    │   ├── Conflict          409: the name of a support set is taken, its version is another one, or a media item is in use
    │   ├── Unavailable       408, 429, 503: temporary; `retry_after` is set if the server states a delay, and
    │   │                     `should_retry` if it states whether the same request may be sent again
    │   ├── ServerFault       any other 5xx
    │   └── StreamFailed      the stream started normally and then carried an error event
    ├── EvaluationFailed      an evaluation that was waited for has failed, or was cancelled
    ├── QueriesFailed         some of many queries failed; `results` has the results of all
    └── UnexpectedReply       the reply does not have the documented form, or ended too early

The text of an error says what to do about it; `message` is the server's own text. A mistake in a call (an unknown option,
an unreadable file) raises Python's own TypeError, ValueError or OSError.

Every error can be pickled, because a process of a pool sends it to the process that waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

from flamboyance_client.advice import advice


class FlamboyanceError(Exception):
    pass


class TransportError(FlamboyanceError):
    pass


class NotConnected(TransportError):
    pass


class TimedOut(TransportError):
    pass


class EvaluationFailed(FlamboyanceError):
    pass


class QueriesFailed(FlamboyanceError):
    """Raised after all queries have been tried. `results` has an error at the position of each that failed.

    `accuracies` are those of the methods that `measure` had finished before.
    """

    def __init__(self, message: str, results: Sequence[Any]) -> None:
        super().__init__(message)
        self.results = results
        self.accuracies: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.results), self.__dict__


@contextmanager
def accuracies_kept() -> Iterator[list[Any]]:
    """Yield a list of accuracies, which an error of further queries keeps."""
    accuracies: list[Any] = []
    try:
        yield accuracies
    except QueriesFailed as error:
        error.accuracies = tuple(accuracies)
        raise


class UnexpectedReply(FlamboyanceError):
    pass


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The fields of the server's error object, the path of the request, and the status and headers of the response."""

    message: str
    type: str | None = None
    param: str | None = None
    code: str | int | None = None
    status: int | None = None
    request_id: str | None = None
    retry_after: float | None = None
    should_retry: bool | None = None
    path: str | None = None


class ApiError(FlamboyanceError):
    def __init__(self, refusal: Refusal) -> None:
        prefix = f"{refusal.status}: " if refusal.status is not None else ""
        what_to_do = advice(refusal.code, refusal.status, refusal.path)
        super().__init__(prefix + refusal.message + (f". {what_to_do}" if what_to_do else ""))
        self.refusal = refusal
        self.message = refusal.message
        self.type = refusal.type
        self.param = refusal.param
        self.code = refusal.code
        self.status = refusal.status
        self.request_id = refusal.request_id
        self.retry_after = refusal.retry_after
        self.should_retry = refusal.should_retry

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.refusal,), self.__dict__

    def about(self, subject: str) -> Self:
        """Return the error with a message that names its subject, such as a file."""
        return type(self)(replace(self.refusal, message=f"{subject}: {self.message}"))


class BadRequest(ApiError):
    pass


class NotAuthorised(ApiError):
    pass


class NotFound(ApiError):
    pass


class Conflict(ApiError):
    pass


class Unavailable(ApiError):
    pass


class ServerFault(ApiError):
    pass


class StreamFailed(ApiError):
    pass


ERROR_TYPES: Mapping[int, type[ApiError]] = {
    401: NotAuthorised,
    403: NotAuthorised,
    404: NotFound,
    408: Unavailable,
    409: Conflict,
    429: Unavailable,
    503: Unavailable,
}
# of the fields of an error object other than its message
FIELD_KINDS: Mapping[str, Any] = {"type": str, "param": str, "code": str | int}


def error_type(status: int) -> type[ApiError]:
    return ERROR_TYPES.get(status, ServerFault if status >= 500 else BadRequest)


def error_fields(body: Any) -> dict[str, Any]:
    """Return the fields of the error object in a body or a stream event, or {} if it has none."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict):
        return {}
    # a proxy or another server may send fields of other kinds
    fields = {name: error.get(name) for name, kind in FIELD_KINDS.items() if isinstance(error.get(name), kind)}
    return {"message": str(error.get("message") or "no message"), **fields}
