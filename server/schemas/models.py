"""Requests about the served model: its tokenizer, its vectors, its attention."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from server.schemas.base import CacheSalt, ModelRequest, TimedRequest, TrackedRequest, User, form_of, with_example
from server.schemas.generation import MAX_MESSAGES, ConversationFields, Message
from server.schemas.prompt import Part, Prompt


class TokenizeRequest(ConversationFields):
    """A prompt, or the messages of a chat."""

    model_config = with_example(prompt="A flamingo is a bird.")

    prompt: Prompt | None = None
    messages: list[Message] = Field([], max_length=MAX_MESSAGES, description="Instead of `prompt`: a conversation.")
    return_token_strs: bool = Field(False, description="Return the text of each token.")
    add_special_tokens: bool = Field(
        True,
        description="`false`: return the tokens of a text without the markers of the model family. No effect on "
        "`messages`.",
    )


class DetokenizeRequest(ModelRequest):
    model_config = with_example(tokens=[65, 66, 67])

    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=2**17)


MAX_INPUTS = 2048

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _input_tag(value: Any) -> str:
    """Return the tag of an input: one text, or a list, whose tag depends on its first element."""
    if not isinstance(value, list):
        return form_of(value)
    first = value[0] if value else None
    kinds = {str: "<list of strings>", int: "<list of token ids>", list: "<list of lists of token ids>"}
    return kinds.get(type(first), "<list of parts>")


Inputs = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[str], Field(max_length=MAX_INPUTS), Tag("<list of strings>")]
    | Annotated[TokenIds, Tag("<list of token ids>")]
    | Annotated[list[TokenIds], Field(max_length=MAX_INPUTS), Tag("<list of lists of token ids>")]
    | Annotated[list[Part], Field(min_length=1, max_length=MAX_INPUTS), Tag("<list of parts>")],
    Discriminator(_input_tag),
]


class EmbeddingsRequest(TimedRequest):
    model_config = with_example(input=["A flamingo is a bird."])

    input: Inputs = Field(description="One or more texts, as strings or token ids, or a list of media parts.")
    encoding_format: Literal["float", "base64"] = Field("float", description="`base64`: float32, little-endian.")
    media_vector: Literal["features", "likeness"] = Field(
        "features",
        description="The vectors of media: the mean features of the vision encoder, or those that searches compare.",
    )
    user: User | None = None
    cache_salt: CacheSalt | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _texts_or_media(cls, value: Any) -> Any:
        kinds = {type(item) for item in value} if isinstance(value, list) else set()
        if str in kinds and dict in kinds:
            raise ValueError("texts and media cannot be in one request")
        return value


class InspectRequest(TrackedRequest):
    """A prompt, an answer, and the token to inspect."""

    prompt: Prompt
    answer: str = Field("", max_length=2**16, description="Text after the prompt, as the model wrote it.")
    token: int | None = Field(
        None, ge=0, le=2**31 - 1, description="Position in prompt and answer, from 0. Default: the last token."
    )
    layers: list[Annotated[int, Field(ge=0)]] = Field(
        [],
        max_length=256,
        description="Gated layers, by the index of the language-model layer after each. Default: the mean of all.",
    )
