"""The optional fields of requests, by route. A field that is missing or None is not sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from flamboyance_client.evaluations import Recommendation
from flamboyance_client.fewshot import Candidate, Example, Json, Selection, Shot, Template
from flamboyance_client.records import SupportSet

# a support set as a name, an id or an object, of which the version is used; or a selection of its examples
Examples = str | SupportSet | Selection | Recommendation
# what shots attend to in addition to themselves: all text before them, or only the text before the first media item
ShotsAttend = Literal["previous", "alone"]
# how a classification uses the examples
Method = Literal["in_context", "nearest_mean", "knn", "linear", "blend", "auto"]


class StructuredOutputs(TypedDict, total=False):
    """The required form of an answer: exactly one of the three fields."""

    choice: Sequence[str]
    regex: str
    json: Json | str


class Options(TypedDict, total=False):
    """The fields of a completion request other than the prompt. A missing field or None means the server's default."""

    model: str | None
    timeout: float | None
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
    shots_attend: ShotsAttend | None
    priority: int | None
    request_id: str | None
    user: str | None
    cache_salt: str | None


class PromptOptions(TypedDict, total=False):
    """The fields that select the shots and the template of a few-shot prompt. `examples` must not be None."""

    shots: Sequence[Shot] | None
    examples: Examples
    template: str | Template | None
    zero_shot: bool | None
    truncate_shots: bool | None


class FewShotOptions(PromptOptions, Options, total=False):
    """The fields of a few-shot completion other than the query."""


class ProbabilityOptions(TypedDict, total=False):
    """The fields that control how the scores of candidates become probabilities."""

    normalisation: Literal["sum", "mean"] | None
    calibration: Literal["none", "contextual"] | None
    content_free: Literal["grey", "no_media", "both"] | None
    permutations: int | None
    seed: int | None


class ClassifyOptions(PromptOptions, ProbabilityOptions, total=False):
    """The fields of a classification other than the query.

    A recommendation as `examples` sets `method` and `temperature`, too. With a target, an answer that is not sure enough
    has no label.
    """

    method: Method | None
    temperature: float | None
    target_accuracy: float | None
    target_coverage: float | None
    model: str | None
    timeout: float | None
    candidates: Sequence[str | Candidate] | None
    top_k: int | None
    shots_attend: ShotsAttend | None
    priority: int | None
    request_id: str | None
    user: str | None
    cache_salt: str | None


class ScoreOptions(TypedDict, total=False):
    """The fields of a score request other than the prompt and the candidates."""

    model: str | None
    timeout: float | None
    shots_attend: ShotsAttend | None
    priority: int | None
    request_id: str | None
    user: str | None
    cache_salt: str | None


class EmbedOptions(TypedDict, total=False):
    """The fields of embeddings other than the input. Searches and methods by likeness compare the vectors "likeness"."""

    media_vector: Literal["features", "likeness"] | None
    model: str | None
    timeout: float | None
    user: str | None
    cache_salt: str | None


class InspectOptions(TypedDict, total=False):
    """The fields of an inspection other than the prompt."""

    model: str | None
    timeout: float | None
    answer: str | None
    token: int | None
    layers: Sequence[int] | None
    request_id: str | None
    user: str | None
    cache_salt: str | None


class EvaluateOptions(ProbabilityOptions, total=False):
    """The fields of a leave-one-out evaluation of a support set. One number or name is the same as a list of it."""

    model: str | None
    version: int | None
    k: int | Sequence[int] | None
    strategies: str | Sequence[str] | None
    methods: str | Sequence[str] | None
    controls: str | Sequence[str] | None
    seeds: int | Sequence[int] | None
    order: str | None
    template: str | Template | None
    shots_attend: ShotsAttend | Sequence[str] | None
    candidates: Sequence[str | Candidate] | None
    max_queries: int | None


class SetFields(TypedDict, total=False):
    """The fields of a support set other than its name and its examples."""

    ttl_seconds: float | None
    expires_at: float | None
    pinned: bool | None
    metadata: Json | None


class NewSet(SetFields, total=False):
    """The fields of a new support set, all optional."""

    name: str | None
    examples: Sequence[Example] | None


class SetChanges(TypedDict, total=False):
    """The changes of a support set. Here None removes a value."""

    name: str | None
    ttl_seconds: float | None
    expires_at: float | None
    pinned: bool
    metadata: Json | None
    expected_version: int | None


class SearchOptions(TypedDict, total=False):
    """The fields of a search for the most similar examples."""

    model: str | None
    timeout: float | None
    version: int | None
    k: int | None
    strategy: Literal["rices_image", "rices_text", "mixed"] | None


class SuggestOptions(TypedDict, total=False):
    """The fields of a request for media to label next, other than the pool."""

    model: str | None
    timeout: float | None
    count: int | None
    version: int | None


class WarmOptions(TypedDict, total=False):
    """The fields of a warm request.

    Media are always encoded and embedded; texts are embedded if `strategy` compares them. With a template, the first `k`
    shots are computed too, or all if they attend alone. With `wait`, the server replies when everything is ready.
    """

    version: int | None
    strategy: Literal["rices_image", "rices_text", "mixed"] | None
    template: str | Template | None
    shots_attend: ShotsAttend | None
    k: int | None
    wait: bool | None
