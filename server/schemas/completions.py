"""What a client may send, field by field. An unknown field, a wrong type or a value out of bounds is refused by name.

`null` means "not given", as in the OpenAI API. Numbers are finite and bounded; strings are never taken for numbers.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Discriminator, Field, Tag, ValidationError
from starlette.datastructures import QueryParams

from server.errors import InvalidRequest, UnsupportedParameter
from server.schemas.base import Schema, tag_of
from server.schemas.media import ImageIdPart, ImageUrlPart, VideoIdPart, VideoUrlPart

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_ANSWERS = 16
# the width that Flamingo's paper searches with
BEAM_WIDTH = 3

SchemaType = TypeVar("SchemaType", bound="Schema")


class TextPart(Schema):
    type: Literal["text"]
    text: str


class EndOfChunkPart(Schema):
    type: Literal["end_of_chunk"]


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImageUrlPart, Tag("<image_url>")]
    | Annotated[VideoUrlPart, Tag("<video_url>")]
    | Annotated[ImageIdPart, Tag("<image_id>")]
    | Annotated[VideoIdPart, Tag("<video_id>")]
    | Annotated[EndOfChunkPart, Tag("<end_of_chunk>")],
    Discriminator(tag_of("type")),
]


def _prompt_tag(value: Any) -> str:
    if isinstance(value, str):
        return "<string>"
    return "<token ids>" if isinstance(value, list) and value and isinstance(value[0], int) else "<parts>"


Prompt = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[Annotated[int, Field(ge=0)]], Tag("<token ids>")]
    | Annotated[list[Part], Tag("<parts>")],
    Discriminator(_prompt_tag),
]

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[StopString, Tag("<string>")]
    | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), Tag("<list>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<list>"),
]


class StreamOptions(Schema):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class StructuredOutputs(Schema):
    """The form of the answer; one of the three."""

    choice: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field(default=[], max_length=1024)
    regex: str = Field(default="", max_length=4096)
    json_schema: dict[str, Any] | str = Field(default="", alias="json")


class GenerationFields(Schema):
    """How to sample and when to stop: the same for every route that generates."""

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    min_tokens: int = Field(0, ge=0, le=2**31 - 1)
    ignore_eos: bool = False
    stop: Stop = Field([], validate_default=False)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([], max_length=128)
    include_stop_str_in_output: bool = False
    n: int = Field(1, ge=1, le=MAX_ANSWERS)
    best_of: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    use_beam_search: bool = False
    length_penalty: float = Field(1.0, ge=-10, le=10)
    early_stopping: bool = False
    structured_outputs: StructuredOutputs = StructuredOutputs()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1)
    request_id: str | None = Field(None, pattern=r"^[\w.:-]{1,128}$")
    user: str | None = Field(None, max_length=256)

    @property
    def form(self) -> StructuredOutputs:
        """The form of the answer, however a route lets it be said."""
        return self.structured_outputs

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionFields(GenerationFields):
    """What is asked of a completion, whatever its prompt is made of."""

    max_tokens: int = Field(16, ge=0, le=2**31 - 1)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class CompletionRequest(CompletionFields):
    prompt: Prompt


class DetokenizeRequest(Schema):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=2**20)


def read(schema: type[SchemaType], body: bytes) -> SchemaType:
    """Raises `InvalidRequest` that names the first field at fault, an unknown field before all others."""
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        problem = next((p for p in problems if p["type"] in UNSUPPORTED), problems[0])
    raise _refusal(problem["type"], _param(problem["loc"]), problem["msg"], problem.get("ctx", {}))


def read_query(schema: type[SchemaType], query: QueryParams) -> SchemaType:
    """The same for what stands behind the question mark; a name that comes twice is refused."""
    if twice := next((name for name in query if len(query.getlist(name)) > 1), None):
        raise InvalidRequest(f"{twice[:64]}: given more than once", param=twice[:64])
    return read(schema, json.dumps(dict(query)).encode())


# pydantic's names of "this server has no such field" and "no such kind of part"
UNSUPPORTED = {"extra_forbidden", "union_tag_invalid"}


def _refusal(kind: str, param: str | None, message: str, context: dict[str, Any]) -> InvalidRequest:
    if kind == "extra_forbidden":
        return UnsupportedParameter(f"unknown parameter {param}", param=param)
    if kind == "union_tag_invalid":
        found, known = (context[name].replace("<", "").replace(">", "") for name in ("tag", "expected_tags"))
        return UnsupportedParameter(f"{param}: no support for {found[:64]}, only {known}", param=param)
    if kind == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}")
    return InvalidRequest(f"{param or 'the body'}: {message}", param=param)


def _param(location: tuple[int | str, ...]) -> str | None:
    """("prompt", "<parts>", 2, "<image_url>", "image_url", "url") -> prompt[2].image_url.url"""
    text = ""
    for step in location:
        if isinstance(step, int):
            text += f"[{step}]"
        elif not step.startswith("<"):
            text += f".{step}" if text else step
    return text or None
