"""What comes back, as frozen data. Fields that a newer server adds are ignored; `raw` keeps the whole object.

A stream's events have a completion's shape: there `text` is what was added, and the last events carry the finish
reasons and the usage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from flamboyance_client.errors import UnexpectedReply

Json = Mapping[str, Any]


def required(values: Json, name: str, kind: type, what: str) -> Any:
    value = values.get(name)
    if not isinstance(value, kind):
        raise UnexpectedReply(f"{what}.{name}: expected {kind.__name__}, got {value!r}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Log-probabilities token by token; the first token of an echoed prompt has none."""

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
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    # for each prompt token None or {token id: {"logprob": ..., "decoded_token": ...}}
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
    """What the request cost. `fewshot_details` counts its media: encoded, cached, deduplicated."""

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
    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None = None
    # of a few-shot completion: which shots were shown, and how they were chosen
    fewshot: Json = field(default_factory=dict)
    raw: Json = field(default_factory=dict, repr=False)

    @property
    def text(self) -> str:
        """The first choice's text; an event that carries only the usage has none."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    id: str
    raw: Json = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, values: Json) -> Self:
        return cls(id=required(values, "id", str, "model"), raw=values)


def parse_models(values: Json) -> tuple[Model, ...]:
    return tuple(Model.parse(model) for model in required(values, "data", list, "models"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """`ready`: the server would take a request now."""

    ready: bool
    raw: Json = field(default_factory=dict, repr=False)
