"""The validation of a list ends at its first invalid entry, in every schema of a request."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_core import to_json

from server.schemas.base import Schema
from server.schemas.generation import ChatRequest, CompletionRequest
from server.schemas.stored import CreateRequest

MANY = 1000
TEXTS: list[Any] = [{"type": "text", "text": "a"}] * MANY


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        (ChatRequest, {"messages": [{"role": "user", "content": [0] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [*TEXTS, *[None] * MANY]}]}),
        (ChatRequest, {"messages": [{"role": "user"}] * MANY}),
        (CompletionRequest, {"prompt": [{"type": "text"}] * MANY}),
        (CompletionRequest, {"prompt": [[-1] * MANY] * 3}),
        (CreateRequest, {"examples": [{}] * MANY}),
        (CreateRequest, {"examples": [{"media": [{}] * MANY}] * MANY}),
    ],
)
def test_one_error_is_reported(schema: type[Schema], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        schema.model_validate_json(to_json(fields))
    assert caught.value.error_count() == 1
