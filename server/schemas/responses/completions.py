"""Responses to prompts: completions, few-shot completions and chats, whole or in chunks, and weighed candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from server.schemas.fewshot import Calibration, Method, Normalisation
from server.schemas.responses.base import Absent, AnswerHead, ResponseRecord, ResponseSchema, Usage
from server.wire import FinishReason


class CompletionLogprobs(ResponseSchema):
    """Four lists of the same length, with one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(ResponseSchema):
    logprob: float
    decoded_token: str


class ChoiceFields(ResponseSchema):
    index: int
    prompt_token_ids: list[int] | None = Field(
        None, description="Present with `return_token_ids`; in a stream, in the first chunk."
    )
    token_ids: list[int] | Absent = Field(None, description="Present with `return_token_ids`.")


class CompletionChoiceFields(ChoiceFields):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | Absent = Field(
        None, description="For each prompt token, the most likely tokens by token id. Null for the first token."
    )


class CompletionChoice(CompletionChoiceFields):
    finish_reason: FinishReason


class CompletionChunkChoice(CompletionChoiceFields):
    finish_reason: FinishReason | None


class Completion(AnswerHead):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(AnswerHead):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = Field(None, description="The usage, if `stream_options` requests it for this chunk.")


class UsedShot(ResponseSchema):
    id: str | None
    score: float | None = Field(
        description="The similarity to the query, from -1 to 1. Null if the strategy does not compare."
    )
    label: str | None


class FewShotReport(ResponseSchema):
    """The shots of the prompt in their order, and where they come from."""

    template: str
    strategy: str | None
    support_set: str | None
    version: int | None
    shots: list[UsedShot]
    shots_left_out: int = Field(description="Shots that `truncate_shots` left out.")


class FewShotPromptReport(FewShotReport):
    prompt: str | Absent = Field(None, description="The text of the prompt. Present with `echo`.")


class FewShotCompletion(Completion):
    fewshot: FewShotPromptReport


class FewShotCompletionChunk(CompletionChunk):
    fewshot: FewShotPromptReport | Absent = Field(None, description="Present in the first chunk.")


class ChatTokenFields(ResponseSchema):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="The UTF-8 bytes of the token. Null if the token alone is not text.")


class ChatToken(ChatTokenFields):
    top_logprobs: list[ChatTokenFields]


class ChatLogprobs(ResponseSchema):
    content: list[ChatToken]
    refusal: None


class FunctionCall(ResponseSchema):
    name: str
    arguments: str = Field(description="JSON that conforms to the parameters of the function.")


class ToolCall(ResponseSchema):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(ResponseSchema):
    role: Literal["assistant"]
    content: str | None = Field(description="Null if a function is called.")
    refusal: None
    tool_calls: list[ToolCall] | Absent = Field(None, description="The call of the function in `tool_choice`.")


class FunctionCallDelta(ResponseSchema):
    name: str | Absent = Field(None, description="Present in the first chunk of a choice.")
    arguments: str


class ToolCallDelta(ResponseSchema):
    index: int
    id: str | Absent = Field(None, description="Present in the first chunk of a choice.")
    type: Literal["function"] | Absent = Field(None, description="Present in the first chunk of a choice.")
    function: FunctionCallDelta


class ChatDelta(ResponseSchema):
    role: Literal["assistant"] | Absent = Field(None, description="Present in the first chunk of a choice.")
    content: str | None = Field(None, description="Absent or null if a function is called.")
    tool_calls: list[ToolCallDelta] | Absent = Field(None, description="The call of the function in `tool_choice`.")


ChatFinishReason = FinishReason | Literal["tool_calls"]


class ChatChoice(ChoiceFields):
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason = Field(description='`tool_calls` with `tool_choice: "required"`.')


class ChatChunkChoice(ChoiceFields):
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletion(AnswerHead):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(AnswerHead):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = Field(None, description="The usage, if `stream_options` requests it for this chunk.")


@dataclass(frozen=True, slots=True)
class WeighedCandidate(ResponseRecord):
    label: str
    text: str
    logprob: Annotated[
        float | None,
        Field(
            description="The sum over its tokens, before normalisation and calibration. Null if no prompt was computed."
        ),
    ]
    num_tokens: int | None
    probability: Annotated[
        float, Field(description="The softmax of the sum of its `scores`, divided by the temperature.")
    ]
    scores: Annotated[
        dict[str, float], Field(description="Its log-probability in each part of the method; a `blend` has two.")
    ]


class ClassificationReport(FewShotReport):
    normalisation: Normalisation
    calibration: Calibration
    permutations: int = Field(description="The number of orders of the shots that were computed.")


class Classification(AnswerHead):
    """The most likely label, and the candidates from the most to the least likely."""

    object: Literal["classification"]
    method: Method = Field(description="The method that was used.")
    label: str | None = Field(description="Null if a target is set and `confidence` does not exceed `threshold`.")
    confidence: float = Field(description="The probability of the most likely candidate.")
    temperature: float = Field(description="The number that divided the log-probabilities.")
    threshold: float | None = Field(description="Null without a target. With 0 every query gets a label, with 1 none.")
    candidates: list[WeighedCandidate]
    fewshot: ClassificationReport
    usage: Usage


class ScoredContinuation(ResponseSchema):
    index: int
    logprob: float
    num_tokens: int
    token_ids: list[int]
    tokens: list[str]
    token_logprobs: list[float]


class Scores(AnswerHead):
    """The log-probabilities of the candidates, in the order of the request."""

    object: Literal["score"]
    data: list[ScoredContinuation]
    usage: Usage
