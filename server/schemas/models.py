"""Requests to the tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.schemas.base import ModelRequest, with_example
from server.schemas.chat import MAX_MESSAGES, Message, TemplateName
from server.schemas.prompt import Prompt


class TokenizeRequest(ModelRequest):
    """A prompt, or the messages of a chat."""

    model_config = with_example(prompt="A flamingo is a bird.")

    prompt: Prompt | None = None
    messages: list[Message] = Field([], max_length=MAX_MESSAGES)
    template: TemplateName = "plain"
    return_token_strs: bool = Field(False, description="Add the text of each token.")
    add_special_tokens: Literal[True] = Field(True, description="A family's markers are always written.")


class DetokenizeRequest(ModelRequest):
    model_config = with_example(tokens=[65, 66, 67])

    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=2**20)
