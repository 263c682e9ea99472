"""The server's public API as pure functions: a call is built as data and its reply is read from bytes, nothing is sent.

Both clients, the waiting one and the async one, are thin senders of what stands here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

from flamboyance_client.errors import ApiError, Refusal, StreamFailed, UnexpectedReply, error_fields, kind_of
from flamboyance_client.prompt import Prompt, to_wire
from flamboyance_client.replies import Completion, Health, Json, Model, parse_models
from flamboyance_client.retries import retry_after
from flamboyance_client.sse import EventParser

Reply = TypeVar("Reply")

DONE = "[DONE]"


class StructuredOutputs(TypedDict, total=False):
    """The form that an answer must have; one of the three."""

    choice: Sequence[str]
    regex: str
    json: Json | str


class Options(TypedDict, total=False):
    """Fields of a completion request besides the prompt. One that is left out, or None, takes the server's default."""

    model: str | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[str, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    n: int | None
    best_of: int | None
    use_beam_search: bool | None
    length_penalty: float | None
    early_stopping: bool | None
    structured_outputs: StructuredOutputs | None
    echo: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    return_token_ids: bool | None
    priority: int | None
    request_id: str | None
    user: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Reply]):
    """One request as data. `read` makes the reply from a status that `accepts` holds and the body."""

    method: str
    path: str
    read: Callable[[int, bytes], Reply]
    body: Json | None = None
    accepts: frozenset[int] = frozenset({200})
    # False: a refusal is the answer, as for a health check
    repeats: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """`model` is sent with each request that names none."""

    model: str | None = None

    def complete(self, prompt: Prompt, options: Options, *, stream: bool = False) -> Call[Completion]:
        if unknown := sorted(options.keys() - Options.__annotations__.keys()):
            raise TypeError(f"unknown option {', '.join(unknown)}")
        body: dict[str, Any] = {"model": self.model, **options}
        body = {name: value for name, value in body.items() if value is not None}
        body["prompt"] = to_wire(prompt)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return Call(method="POST", path="/v1/completions", body=body, read=_read_completion)

    def models(self) -> Call[tuple[Model, ...]]:
        return Call(method="GET", path="/v1/models", read=lambda status, body: parse_models(_object(body)))

    def health(self) -> Call[Health]:
        return Call(method="GET", path="/health", read=_read_health, accepts=frozenset({200, 503}), repeats=False)


def _read_completion(status: int, body: bytes) -> Completion:
    return Completion.parse(_object(body))


def _read_health(status: int, body: bytes) -> Health:
    return Health(ready=status == 200, raw=_object(body) if body else {})


def _object(data: bytes | str) -> Json:
    try:
        values = json.loads(data)
    except ValueError:
        raise UnexpectedReply(f"expected JSON, got {data[:200]!r}") from None
    if not isinstance(values, dict):
        raise UnexpectedReply(f"expected a JSON object, got {data[:200]!r}")
    return values


def api_error(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """The error that a status outside a call's `accepts` stands for, whoever sent it: a proxy's need not be JSON."""
    try:
        fields = error_fields(json.loads(body))
    except ValueError:
        fields = {}
    fields.setdefault("message", body[:200].decode("utf-8", "replace") or "no message")
    head: dict[str, Any] = {"status": status, "request_id": headers.get("x-request-id")}
    return kind_of(status)(Refusal(**fields, **head, retry_after=retry_after(headers)))


class CompletionEvents:
    """Reads a stream's bytes into completions; an error event raises, and so does an end without `[DONE]`."""

    def __init__(self) -> None:
        self._parser = EventParser()
        self._done = False

    def feed(self, received: bytes) -> Iterator[Completion]:
        for data in self._parser.feed(received):
            if self._done or data == DONE:
                self._done = True
                continue
            values = _object(data)
            if fields := error_fields(values):
                raise StreamFailed(Refusal(**fields))
            yield Completion.parse(values)

    def finish(self) -> None:
        if not self._done:
            raise UnexpectedReply(f"the stream ended before {DONE}")
