"""Requests to the tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.schemas.base import ModelRequest
from server.schemas.chat import MAX_MESSAGES, Message, TemplateName
from server.schemas.prompt import Prompt


class TokenizeRequest(ModelRequest):
    """A prompt, or the messages of a chat. `add_special_tokens`: a family's markers are always written."""

    prompt: Prompt | None = None
    messages: list[Message] = Field([], max_length=MAX_MESSAGES)
    template: TemplateName = "plain"
    return_token_strs: bool = False
    add_special_tokens: Literal[True] = True


class DetokenizeRequest(ModelRequest):
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=2**20)
