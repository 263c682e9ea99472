"""Generation options, shared by every route that generates, and the completion request."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from server.schemas.base import PrioritizedRequest, Schema, with_example
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
    include_usage: bool = Field(default=False, description="Add a last chunk with the usage.")
    continuous_usage_stats: bool = Field(default=False, description="Add the usage so far to every chunk.")


class StructuredOutputs(Schema):
    """The form of the answer, by one of the three fields."""

    choice: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field(default=[], max_length=1024)
    regex: str = Field(default="", max_length=4096)
    json_schema: dict[str, Any] | str = Field(default="", alias="json")


class GenerationFields(PrioritizedRequest):
    """Sampling and stopping options of every route that generates."""

    temperature: float = Field(1.0, ge=0, le=100, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="0 or -1: all tokens.")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, max_length=1024, description="Biases by token id."
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="The same seed gives the same answer.")
    min_tokens: int = Field(0, ge=0, le=2**31 - 1, description="The answer does not end before it has as many tokens.")
    ignore_eos: bool = False
    stop: Stop = Field([], validate_default=False, description="The text ends before the first that appears.")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([], max_length=128)
    include_stop_str_in_output: bool = Field(False, description="The text ends after the stop string.")
    n: int = Field(1, ge=1, le=MAX_ANSWERS, description="The number of answers.")
    best_of: int | None = Field(None, ge=1, le=MAX_ANSWERS, description="Beams; without it 3, or `n` if it is more.")
    use_beam_search: bool = Field(False, description="Search with beams, and return the `n` best answers.")
    length_penalty: float = Field(1.0, ge=-10, le=10, description="Of the beam search.")
    early_stopping: bool = Field(False, description="Of the beam search.")
    structured_outputs: StructuredOutputs | None = None
    stream: bool = Field(False, description="Return server-sent events.")
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = Field(False, description="Add the token ids of prompt and answer.")


class CompletionFields(GenerationFields):
    """The fields of a completion besides its prompt."""

    max_tokens: int = Field(16, ge=0, le=2**31 - 1, description="0 computes the prompt alone.")
    echo: bool = Field(False, description="The text begins with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Most likely tokens to return for each.")
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="The same, for the prompt.")


class CompletionRequest(CompletionFields):
    model_config = with_example(prompt="A flamingo is", max_tokens=8)

    prompt: Prompt
