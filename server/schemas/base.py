"""What every schema of a request holds to: unknown fields are refused, `null` is "not given", nothing is converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


# tags of unions stand in angle brackets, so that they are told apart from the client's own names in a location
def tag_of(field: str) -> Callable[[Any], str]:
    return lambda value: f"<{value.get(field)}>" if isinstance(value, dict) else f"<{type(value).__name__}>"
