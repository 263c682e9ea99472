"""The server's public API as pure functions that build calls as data and parse replies from bytes, without sending.

Both clients, the blocking one and the async one, are thin senders of these calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from flamboyance_client.bodies import check_values
from flamboyance_client.errors import (
    FlamboyanceError,
    Refusal,
    StreamFailed,
    UnexpectedReply,
    error_fields,
    error_type,
)
from flamboyance_client.evaluations import Evaluation, Recommendation
from flamboyance_client.fewshot import AnyQuery, Selection, as_query, with_media
from flamboyance_client.options import (
    ClassifyOptions,
    EmbedOptions,
    Examples,
    FewShotOptions,
    InspectOptions,
    Options,
    ScoreOptions,
)
from flamboyance_client.prompt import Part, Prompt, checked_list, checked_text, to_wire
from flamboyance_client.records import Classification, Score, SupportSet, scores, vectors
from flamboyance_client.replies import Completion, Health, Json, Model, parse_completion, parse_models
from flamboyance_client.retries import Retries, retry_after, should_retry
from flamboyance_client.sse import EventParser

Reply = TypeVar("Reply")
Fields = TypeVar("Fields", bound=Mapping[str, Any])

DONE = "[DONE]"
# the fields of a recommended request that any method may have
OF_EVERY_METHOD = ("model", "template", "candidates")
# methods that compare the query with all examples: a request with one of them selects no shots of a prompt
OF_ALL_EXAMPLES = {"nearest_mean", "knn", "linear"}
NO_EXAMPLES = (
    "examples is None: leave it out, or pass a support set; the recommendation of an evaluation that recommends nothing is "
    "None, and then the support set can be passed itself: examples=evaluation.recommendation or support_set"
)
CANDIDATES = 'candidates must be a list of texts or of lists of token ids, such as ["cat", "dog"]'
INPUTS = "the input must be a text or a list of texts or parts, such as [image(...)]"
SHOTS = "shots must be a list, such as [example(...)]"
WRONG_SERVER = "Is this the address of a Flamboyance server?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Reply]):
    """A request as data. `read` parses the reply from the body and from a status in `accepts`."""

    method: str
    path: str
    read: Callable[[int, bytes], Reply]
    body: Json | None = None
    # Bytes to send instead of JSON, and their media type.
    content: bytes | None = None
    # A file to send instead of these bytes.
    file: Path | None = None
    content_type: str | None = None
    query: Mapping[str, str | int] = field(default_factory=dict)
    accepts: frozenset[int] = frozenset({200})
    # A health check is not retried: an unavailable server is its answer.
    is_retryable: bool = True
    # Whether the call has the same effect when the server runs it twice.
    can_run_twice: bool = True
    # The server runs a call once per key, and returns the first result again.
    idempotency_key: str | None = None

    def delay(self, retries: Retries, attempts: int, error: FlamboyanceError) -> float | None:
        """Return the seconds to wait before the call is sent again, or None if its error is final."""
        return retries.delay(attempts, error, can_run_twice=self.can_run_twice) if self.is_retryable else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """Builds the calls of the API. `model` is sent with each request that sets no model."""

    model: str | None = None

    def complete(self, prompt: Prompt, options: Options, *, stream: bool = False) -> Call[Completion]:
        return self._generate("/v1/completions", {"prompt": to_wire(prompt)}, checked_options(Options, options), stream)

    def fewshot(self, query: AnyQuery, options: FewShotOptions, *, stream: bool = False) -> Call[Completion]:
        fields = {"query": as_query(query)}
        sent = {**_recommended_prompt(options.get("examples")), **_shot_options(FewShotOptions, options)}
        return self._generate("/v1/fewshot/completions", fields, sent, stream)

    def classify(self, query: AnyQuery, options: ClassifyOptions) -> Call[Classification]:
        fields = {"query": as_query(query)}
        return self._post(
            "/v1/classify",
            fields,
            {**_recommended_fields(options), **_shot_options(ClassifyOptions, options)},
            lambda values: replace(Classification.parse(values), query=query),
        )

    def score(
        self, prompt: Prompt, candidates: Sequence[str | Sequence[int]], options: ScoreOptions
    ) -> Call[tuple[Score, ...]]:
        fields = {"prompt": to_wire(prompt), "candidates": checked_list(candidates, CANDIDATES)}
        return self._post("/v1/score", fields, checked_options(ScoreOptions, options), scores)

    def embed(self, inputs: str | Sequence[str | Part], options: EmbedOptions) -> Call[tuple[tuple[float, ...], ...]]:
        """Embed either texts or media, whose vectors are in different spaces."""
        items = [inputs] if isinstance(inputs, str) else checked_list(inputs, INPUTS)
        parts = [checked_text(item) if isinstance(item, str) else item for item in items]
        return self._post("/v1/embeddings", {"input": parts}, checked_options(EmbedOptions, options), vectors)

    def inspect(self, prompt: Prompt, options: InspectOptions) -> Call[Json]:
        return self._post("/v1/inspect", {"prompt": to_wire(prompt)}, checked_options(InspectOptions, options), dict)

    def models(self) -> Call[tuple[Model, ...]]:
        return Call(method="GET", path="/v1/models", read=json_reader(parse_models))

    def health(self) -> Call[Health]:
        return Call(method="GET", path="/health", read=_read_health, accepts=frozenset({200, 503}), is_retryable=False)

    def _generate(self, path: str, fields: Json, options: Json, stream: bool) -> Call[Completion]:
        streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return self._post(path, fields, {**options, **streaming}, parse_completion)

    def _post(self, path: str, fields: Json, options: Json, parse: Callable[[Json], Reply]) -> Call[Reply]:
        model = {} if self.model is None else {"model": self.model}
        return Call(method="POST", path=path, body={**model, **options, **fields}, read=json_reader(parse))


def with_lists(options: Fields) -> Fields:
    """Return the options with lists in place of iterators, which can be read only once."""
    fields: Any = {name: list(value) if isinstance(value, Iterator) else value for name, value in options.items()}
    return fields


def checked_options(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None, with lists in place of iterators.

    Raises `TypeError` for an option that `kind` does not have, and `ValueError` for a value that cannot be sent.
    """
    if unknown := sorted(options.keys() - kind.__annotations__.keys()):
        raise TypeError(f"unknown option {', '.join(unknown)}{_advice(unknown[0], kind.__annotations__)}")
    options = with_lists(options)
    check_values(options)
    return {name: value for name, value in options.items() if value is not None}


def _advice(unknown: str, known: Iterable[str]) -> str:
    """Return where an option belongs that another part of a request has, or which one it may be."""
    if unknown in ("question", "text", "media"):
        return f': it is a part of the query, such as {{"image": "cat.jpg", "{unknown}": ...}}'
    if unknown in Selection.__annotations__ and "examples" in known:
        return f': it is a part of examples, such as examples={{"support_set": "pets", "{unknown}": ...}}'
    return "".join(f"; did you mean {name}?" for name in get_close_matches(unknown, known, n=1))


def checked_selection(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as `checked_options` does, with the selection of examples in the form of the API.

    Raises `ValueError` for examples that are None, and `TypeError` for other objects that are no examples.
    """
    fields = checked_options(kind, options)
    return {**fields, "examples": _selection(options)} if "examples" in options else fields


def classification_fields(options: ClassifyOptions) -> dict[str, Any]:
    """Return the fields of a classification, with those of a recommendation and with media as they were passed."""
    return {**_recommended_fields(options), **checked_selection(ClassifyOptions, options)}


def _shot_options(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as `checked_selection` does, with shots in the form of the API."""
    fields = checked_selection(kind, options)
    if "shots" in fields:
        fields["shots"] = [with_media(shot) for shot in checked_list(fields["shots"], SHOTS)]
    return fields


def _selection(options: Mapping[str, Any]) -> Selection:
    """Return the selection of a recommendation, or one of a whole support set, given by name, id or version."""
    examples: Examples | None = options["examples"]
    if examples is None:
        raise ValueError(NO_EXAMPLES)
    if isinstance(examples, Evaluation):
        raise TypeError("examples must be evaluation.recommendation, not the evaluation")
    if isinstance(examples, Recommendation):
        selection = examples.examples
        if options.get("method") in OF_ALL_EXAMPLES:
            return cast(Selection, {name: selection[name] for name in ("support_set", "version") if name in selection})
        return selection
    if isinstance(examples, SupportSet):
        return {"support_set": examples.id, "version": examples.version}
    return {"support_set": examples} if isinstance(examples, str) else examples


def _recommended_fields(options: ClassifyOptions) -> dict[str, Any]:
    """Return the method and other fields of a recommendation; for another method, only those of every method."""
    examples = options.get("examples")
    if not isinstance(examples, Recommendation):
        return {}
    is_followed = options.get("method") in (None, examples.method)
    return _fields_of(examples, [*examples.request] if is_followed else OF_EVERY_METHOD)


def _recommended_prompt(examples: Any) -> dict[str, Any]:
    """Return the fields of a recommendation that a completion has, too."""
    if not isinstance(examples, Recommendation):
        return {}
    return _fields_of(examples, ("shots_attend", "model", "template"))


def _fields_of(recommendation: Recommendation, names: Iterable[str]) -> dict[str, Any]:
    """Return those of these fields that the recommended request has, apart from its selection of shots."""
    fields = recommendation.request
    return {name: fields[name] for name in names if name != "examples" and fields.get(name) is not None}


def json_reader(parse: Callable[[Json], Reply]) -> Callable[[int, bytes], Reply]:
    """Return a reader that parses the JSON object of a reply's body."""
    return lambda status, body: _parsed(parse, _object(body))


def _parsed(parse: Callable[[Json], Reply], values: Json) -> Reply:
    try:
        return parse(values)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UnexpectedReply(f"the reply does not have the documented form ({problem}): {values!r:.200}") from error


def _read_health(status: int, body: bytes) -> Health:
    """Return the health. A proxy may answer in place of a server that is not ready, and its body need not be JSON."""
    try:
        return Health(ready=status == 200, raw=_object(body) if body else {})
    except UnexpectedReply:
        if status == 200:
            raise
        return Health(ready=False)


def _object(data: bytes | str) -> Json:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise UnexpectedReply(f"expected JSON, got {data[:200]!r}. {WRONG_SERVER}") from None
    if not isinstance(values, dict):
        raise UnexpectedReply(f"expected a JSON object, got {data[:200]!r}. {WRONG_SERVER}")
    return values


def status_error(path: str, status: int, headers: Mapping[str, str], body: bytes) -> FlamboyanceError:
    """Return the error for a status outside a call's `accepts`. The body may come from a proxy and need not be JSON."""
    if status < 300:
        return UnexpectedReply(f"the status {status} was not expected, with {body[:200]!r}. {WRONG_SERVER}")
    try:
        fields = error_fields(json.loads(body))
    except (ValueError, RecursionError):
        fields = {}
    if 300 <= status < 400 and (location := headers.get("location")):
        fields["message"] = f"{path} is redirected to {location}: pass the address of the server itself"
    fields.setdefault("message", body[:200].decode("utf-8", "replace") or "no message")
    response: dict[str, Any] = {"path": path, "status": status, "request_id": headers.get("x-request-id")}
    retrying: dict[str, Any] = {"retry_after": retry_after(headers), "should_retry": should_retry(headers)}
    return error_type(status)(Refusal(**fields, **response, **retrying))


class CompletionEvents:
    """Parses the bytes of a stream into completions. Raises on an error event, and on an end without `[DONE]`."""

    def __init__(self) -> None:
        self._parser = EventParser()
        self._is_done = False

    def feed(self, received: bytes) -> Iterator[Completion]:
        for data in self._parser.feed(received):
            if self._is_done or data == DONE:
                self._is_done = True
                continue
            values = _object(data)
            if fields := error_fields(values):
                raise StreamFailed(Refusal(**fields))
            yield _parsed(Completion.parse, values)

    def finish(self) -> None:
        if not self._is_done:
            raise UnexpectedReply(f"the stream ended before {DONE}")
