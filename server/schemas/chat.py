"""Chat requests: messages, and OpenAI's names for length, form of the answer and log-probabilities."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from server.schemas.base import Schema, tag_of, with_example
from server.schemas.generation import MAX_LOGPROBS, CompletionFields, GenerationFields, StructuredOutputs
from server.schemas.prompt import ImageIdPart, ImageUrlPart, TextPart, VideoIdPart, VideoUrlPart

MAX_MESSAGES = 2048
# answers of a Flamingo are short; one that never ends its chunk would continue to the end of the context
DEFAULT_MAX_TOKENS = 256


class InputTextPart(Schema):
    type: Literal["input_text"]
    text: str


class InputImagePart(Schema):
    """An image in the form of the Responses API."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] = "auto"


UserPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImageUrlPart, Tag("<image_url>")]
    | Annotated[VideoUrlPart, Tag("<video_url>")]
    | Annotated[ImageIdPart, Tag("<image_id>")]
    | Annotated[VideoIdPart, Tag("<video_id>")]
    | Annotated[InputTextPart, Tag("<input_text>")]
    | Annotated[InputImagePart, Tag("<input_image>")],
    Discriminator(tag_of("type")),
]


def _content_tag(value: Any) -> str:
    return "<string>" if isinstance(value, str) else "<parts>"


Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[UserPart], Tag("<parts>")], Discriminator(_content_tag)
]
Written = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[TextPart], Tag("<parts>")], Discriminator(_content_tag)
]


class SystemMessage(Schema):
    role: Literal["system", "developer"]
    content: Written


class UserMessage(Schema):
    role: Literal["user"]
    content: Content


class AssistantMessage(Schema):
    """A message as a response has it: fields without a value may be sent back as null."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"type": "null"}})

    role: Literal["assistant"]
    content: Written


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[SystemMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")],
    Discriminator(tag_of("role")),
]


TemplateName = Annotated[str, Field(min_length=1, max_length=128)]


class TextFormat(Schema):
    type: Literal["text"]


class JsonObjectFormat(Schema):
    type: Literal["json_object"]


class NamedSchema(Schema):
    """A JSON schema with a name; `strict` changes nothing, since an answer always conforms to its schema."""

    name: str = Field(max_length=256)
    description: str = ""
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class JsonSchemaFormat(Schema):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(tag_of("type")),
]


class ChatRequest(GenerationFields):
    model_config = with_example(messages=[{"role": "user", "content": "What is a flamingo?"}], max_tokens=8)

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="As `max_completion_tokens`.")
    max_completion_tokens: int | None = Field(
        None, ge=0, le=2**31 - 1, description=f"Without it {DEFAULT_MAX_TOKENS}, if there is room."
    )
    logprobs: bool = Field(False, description="Return the log-probabilities of the tokens.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Most likely tokens to return for each.")
    response_format: ResponseFormat = TextFormat(type="text")
    template: TemplateName = Field("plain", description="`plain`, or the name of a template of few-shot requests.")
    # only the values that match the server's behaviour: nothing is stored, the answer is text, no tool is called
    store: Literal[False] = False
    modalities: list[Literal["text"]] = Field([])
    tool_choice: Literal["none"] = "none"

    def completion(self) -> CompletionFields:
        """Return the options by the names that a completion has for them."""
        shared = self.model_fields_set & GenerationFields.model_fields.keys()
        options = {name: getattr(self, name) for name in shared}
        for length in (self.max_tokens, self.max_completion_tokens):
            if length is not None:
                options["max_tokens"] = length
        fields_set = set(options)
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        match self.response_format:
            case JsonObjectFormat():
                options["structured_outputs"] = StructuredOutputs(json={"type": "object"})
            case JsonSchemaFormat():
                options["structured_outputs"] = StructuredOutputs(json=self.response_format.json_schema.json_schema)
        return CompletionFields.model_construct(fields_set, **{"max_tokens": DEFAULT_MAX_TOKENS, **options})
