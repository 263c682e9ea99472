"""Requests about the served model: its tokenizer, its vectors, its attention."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.schemas.base import CacheSalt, ModelRequest, TimedRequest, TrackedRequest, User, with_example
from server.schemas.generation import MAX_MESSAGES, ConversationFields, Message
from server.schemas.prompt import Part, Prompt


class TokenizeRequest(ConversationFields):
    """A prompt, or the messages of a chat."""

    model_config = with_example(prompt="A flamingo is a bird.")

    prompt: Prompt | None = None
    messages: list[Message] = Field([], max_length=MAX_MESSAGES)
    return_token_strs: bool = Field(False, description="Add the text of each token.")
    add_special_tokens: bool = Field(
        True,
        description="`false` with a text: its tokens alone, without the family's markers. No effect on messages, whose "
        "template writes the markers.",
    )


class DetokenizeRequest(ModelRequest):
    model_config = with_example(tokens=[65, 66, 67])

    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=2**17)


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


class EmbeddingsRequest(TimedRequest):
    model_config = with_example(input=["A flamingo is a bird."])

    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    media_vector: Literal["features", "likeness"] = Field(
        "features",
        description="Of media: the vision encoder's mean features, or the vectors by which media are compared.",
    )
    user: User | None = None
    cache_salt: CacheSalt | None = None


class InspectRequest(TrackedRequest):
    """A prompt, an answer, and the token of the two to look at."""

    prompt: Prompt
    answer: str = Field("", max_length=2**16, description="The text after the prompt.")
    token: int | None = Field(None, ge=0, le=2**31 - 1, description="Its position; the last, if not given.")
    layers: list[Annotated[int, Field(ge=0)]] = Field(
        [],
        max_length=256,
        description="Gated layers, by the language-model layers after them; the mean of all, if not given.",
    )
