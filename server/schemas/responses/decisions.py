"""The answers to the questions of a decision, in OpenAI's shape, with what this server adds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.schemas.fewshot import Method
from server.schemas.responses.base import Absent, AnswerHead, FewShotDetails, ResponseSchema


class AnswerFields(ResponseSchema):
    name: str | None = Field(description="The name of the question.")


class PredicateAnswer(AnswerFields):
    type: Literal["predicate"]
    probability: float


class ChoiceProbability(ResponseSchema):
    value: str | bool
    probability: float


class ChoiceAnswer(AnswerFields):
    """The most likely value, and the probabilities of all values in the order of the request."""

    type: Literal["choice"]
    choice: str | bool
    confidence: float = Field(description="The probability of the choice.")
    probabilities: list[ChoiceProbability]
    method: Method | Absent = Field(
        None, description="The method that made the choice. Present with `shots` or `examples`."
    )


class LevelProbability(ResponseSchema):
    label: str
    value: int = Field(description="The index of the level, from 0.")
    probability: float


class ScoreAnswer(AnswerFields):
    """The mean of the indices of the levels, weighted by their probabilities."""

    type: Literal["score"]
    score: float
    confidence: float = Field(description="The probability of the most likely level.")
    probabilities: list[LevelProbability]


class RefusalAnswer(AnswerFields):
    """A question without an answer: it does not fit into the context, or its confidence does not exceed the threshold."""

    type: Literal["refusal"]


class InputTokensDetails(ResponseSchema):
    cached_tokens: int = Field(description="Prompt tokens that were in the prefix cache.")
    cache_write_tokens: int = Field(description="Always 0: the server does not count them.")


class OutputTokensDetails(ResponseSchema):
    reasoning_tokens: int


class DecisionUsage(ResponseSchema):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    fewshot_details: FewShotDetails


class Decision(AnswerHead):
    """The answers in the order of the questions."""

    object: Literal["decision"]
    answers: list[Annotated[PredicateAnswer | ChoiceAnswer | ScoreAnswer | RefusalAnswer, Field(discriminator="type")]]
    usage: DecisionUsage
