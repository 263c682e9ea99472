"""Completions and other replies as frozen data. Unknown fields of newer servers are ignored; `raw` holds the whole object.

The events of a stream have the form of a completion: `text` is the new text, and the last events hold the finish reasons
and the usage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from flamboyance_client.errors import UnexpectedReply

Json = Mapping[str, Any]


def required(values: Json, name: str, kind: type, path: str) -> Any:
    """Return a field of a reply. Raises `UnexpectedReply` if it is missing or has another type."""
    value = values.get(name)
    if not isinstance(value, kind):
        raise UnexpectedReply(f"{path}.{name}: expected {kind.__name__}, got {value!r}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Log-probabilities per token. The first token of an echoed prompt has none."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[Mapping[str, float] | None, ...]
    text_offset: tuple[int, ...]

    @classmethod
    def parse(cls, values: Json) -> Self:
        tokens = tuple(required(values, "tokens", list, "logprobs"))
        return cls(
            tokens=tokens,
            token_logprobs=tuple(required(values, "token_logprobs", list, "logprobs")),
            top_logprobs=tuple(values.get("top_logprobs") or [None] * len(tokens)),
            text_offset=tuple(values.get("text_offset") or []),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One answer of a completion."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    # Per prompt token: None or {token id: {"logprob": ..., "decoded_token": ...}}
    prompt_logprobs: tuple[Json | None, ...] | None = None

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(
            index=values.get("index", 0),
            text=required(values, "text", str, "choice"),
            finish_reason=values.get("finish_reason"),
            logprobs=Logprobs.parse(values["logprobs"]) if values.get("logprobs") else None,
            token_ids=_tuple(values.get("token_ids")),
            prompt_token_ids=_tuple(values.get("prompt_token_ids")),
            prompt_logprobs=_tuple(values.get("prompt_logprobs")),
        )


def _tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The token counts of a request. `fewshot_details` counts its media: encoded, cached, deduplicated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0
    fewshot_details: Json = field(default_factory=dict)

    @classmethod
    def parse(cls, values: Json) -> Self:
        prompt = required(values, "prompt_tokens", int, "usage")
        completion = values.get("completion_tokens") or 0
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=values.get("total_tokens") or prompt + completion,
            cached_tokens=(values.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            fewshot_details=values.get("fewshot_details") or {},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A completion, or one event of its stream."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None = None
    # Few-shot completions only: the shots of the prompt and their selection.
    fewshot: Json = field(default_factory=dict)
    raw: Json = field(default_factory=dict, repr=False)

    @property
    def text(self) -> str:
        """Return the text of the first choice, or an empty string for an event with only the usage."""
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason if self.choices else None

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(
            id=values.get("id", ""),
            model=values.get("model", ""),
            choices=tuple(Choice.parse(choice) for choice in required(values, "choices", list, "completion")),
            usage=Usage.parse(values["usage"]) if values.get("usage") else None,
            fewshot=values.get("fewshot") or {},
            raw=values,
        )


def parse_completion(values: Json) -> Completion:
    """Return a completion. Raises `UnexpectedReply` if it has no choice, as only events of a stream may have none."""
    completion = Completion.parse(values)
    if not completion.choices:
        raise UnexpectedReply("completion.choices: expected at least one, got none")
    return completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A served model."""

    id: str
    raw: Json = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(id=required(values, "id", str, "model"), raw=values)


def parse_models(values: Json) -> tuple[Model, ...]:
    return tuple(Model.parse(model) for model in required(values, "data", list, "models"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The health of the server. `ready` means that it accepts requests."""

    ready: bool
    raw: Json = field(default_factory=dict, repr=False)
