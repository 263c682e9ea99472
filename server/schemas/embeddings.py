"""Requests for embeddings: texts or media, one kind per request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.schemas.base import ModelRequest, User, with_example
from server.schemas.prompt import Part

MAX_INPUTS = 2048

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _input_tag(value: Any) -> str:
    """One text, as a string or as token ids; or several of one sort, by the first of them."""
    if isinstance(value, str):
        return "<string>"
    first = value[0] if isinstance(value, list) and value else None
    kinds = {str: "<strings>", int: "<token ids>", list: "<lists of token ids>"}
    return kinds.get(type(first), "<parts>")


Inputs = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[str], Field(max_length=MAX_INPUTS), Tag("<strings>")]
    | Annotated[TokenIds, Tag("<token ids>")]
    | Annotated[list[TokenIds], Field(max_length=MAX_INPUTS), Tag("<lists of token ids>")]
    | Annotated[list[Part], Field(min_length=1, max_length=MAX_INPUTS), Tag("<parts>")],
    Discriminator(_input_tag),
]


class EmbeddingsRequest(ModelRequest):
    model_config = with_example(input=["A flamingo is a bird."])

    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    user: User | None = None
