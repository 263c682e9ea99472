"""Generation options, shared by every route that generates, and the completion request."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from server.schemas.base import PrioritizedRequest, Schema
from server.schemas.prompt import Prompt

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_ANSWERS = 16
# the beam width of the Flamingo paper
BEAM_WIDTH = 3

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
    """The required form of the answer: one of the three."""

    choice: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field(default=[], max_length=1024)
    regex: str = Field(default="", max_length=4096)
    json_schema: dict[str, Any] | str = Field(default="", alias="json")


class GenerationFields(PrioritizedRequest):
    """Sampling and stopping options of every route that generates."""

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

    @property
    def form(self) -> StructuredOutputs:
        """The required form of the answer, whichever field of a route states it."""
        return self.structured_outputs


class CompletionFields(GenerationFields):
    """The fields of a completion besides its prompt."""

    max_tokens: int = Field(16, ge=0, le=2**31 - 1)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class CompletionRequest(CompletionFields):
    prompt: Prompt
