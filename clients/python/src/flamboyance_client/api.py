"""The server's public API as pure functions: a call is built as data and its reply is read from bytes, nothing is sent.

Both clients, the waiting one and the async one, are thin senders of what stands here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flamboyance_client.errors import ApiError, Refusal, StreamFailed, UnexpectedReply, error_fields, kind_of
from flamboyance_client.fewshot import Query
from flamboyance_client.options import ClassifyOptions, FewShotOptions, InspectOptions, Options, ScoreOptions
from flamboyance_client.prompt import Part, Prompt, to_wire
from flamboyance_client.records import Classification, Score, scores, vectors
from flamboyance_client.replies import Completion, Health, Json, Model, parse_models
from flamboyance_client.retries import retry_after
from flamboyance_client.sse import EventParser

Reply = TypeVar("Reply")

DONE = "[DONE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Reply]):
    """One request as data. `read` makes the reply from a status that `accepts` holds and the body."""

    method: str
    path: str
    read: Callable[[int, bytes], Reply]
    body: Json | None = None
    # bytes in place of JSON, with their type
    content: bytes | None = None
    content_type: str | None = None
    query: Mapping[str, str | int] = field(default_factory=dict)
    accepts: frozenset[int] = frozenset({200})
    # False: a refusal is the answer, as for a health check
    repeats: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """`model` is sent with each request that names none."""

    model: str | None = None

    def complete(self, prompt: Prompt, options: Options, *, stream: bool = False) -> Call[Completion]:
        return self._generate("/v1/completions", {"prompt": to_wire(prompt)}, given(Options, options), stream)

    def fewshot(self, query: Query, options: FewShotOptions, *, stream: bool = False) -> Call[Completion]:
        return self._generate("/v1/fewshot/completions", {"query": query}, given(FewShotOptions, options), stream)

    def classify(self, query: Query, options: ClassifyOptions) -> Call[Classification]:
        return self._ask("/v1/classify", {"query": query}, given(ClassifyOptions, options), Classification.parse)

    def score(
        self, prompt: Prompt, candidates: Sequence[str | Sequence[int]], options: ScoreOptions
    ) -> Call[tuple[Score, ...]]:
        what = {"prompt": to_wire(prompt), "candidates": list(candidates)}
        return self._ask("/v1/score", what, given(ScoreOptions, options), scores)

    def embed(self, inputs: str | Sequence[str | Part]) -> Call[tuple[tuple[float, ...], ...]]:
        """Texts, or media: not both at once, their vectors are of different spaces."""
        return self._ask("/v1/embeddings", {"input": inputs}, {}, vectors)

    def inspect(self, prompt: Prompt, options: InspectOptions) -> Call[Json]:
        return self._ask("/v1/inspect", {"prompt": to_wire(prompt)}, given(InspectOptions, options), dict)

    def models(self) -> Call[tuple[Model, ...]]:
        return Call(method="GET", path="/v1/models", read=reading(parse_models))

    def health(self) -> Call[Health]:
        return Call(method="GET", path="/health", read=_read_health, accepts=frozenset({200, 503}), repeats=False)

    def _generate(self, path: str, what: Json, options: Json, stream: bool) -> Call[Completion]:
        streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return self._ask(path, what, {**options, **streaming}, Completion.parse)

    def _ask(self, path: str, what: Json, options: Json, parse: Callable[[Json], Reply]) -> Call[Reply]:
        model = {} if self.model is None else {"model": self.model}
        return Call(method="POST", path=path, body={**model, **options, **what}, read=reading(parse))


def given(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given. Raises `TypeError` for one that `kind` does not have."""
    if unknown := sorted(options.keys() - kind.__annotations__.keys()):
        raise TypeError(f"unknown option {', '.join(unknown)}")
    return {name: value for name, value in options.items() if value is not None}


def reading(parse: Callable[[Json], Reply]) -> Callable[[int, bytes], Reply]:
    return lambda status, body: parse(_object(body))


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
