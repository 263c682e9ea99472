"""Decisions in OpenAI's shape: an input, and questions about it, each a predicate, a choice or a score."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from server.schemas.base import NO_SUPPORT, PrioritizedRequest, Schema, form_of, tag_of, with_example
from server.schemas.fewshot import (
    MAX_CANDIDATES,
    CandidateText,
    ConfidenceFields,
    MethodChoice,
    ShotsFields,
    TemplateChoice,
    WeighingFields,
)
from server.schemas.generation import MAX_MESSAGES
from server.schemas.json_object import JsonObject
from server.schemas.prompt import BREAKPOINT, DETAIL, CacheBreakpoint

MAX_QUESTIONS = 400
# of all questions together; each is scored by the language model
MAX_ANSWERS = 4096

# the answers to a predicate, and the texts of boolean choices
YES, NO = "yes", "no"
UNUSED = "Accepted and not used."


class DecisionTextPart(Schema):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: CacheBreakpoint | None = Field(None, description=BREAKPOINT)


class DecisionImagePart(Schema):
    type: Literal["input_image"]
    image_url: str = Field(
        min_length=1,
        description="A data URL, an `https` URL of a host that the setting `media_url_hosts` allows, or the id of an "
        "uploaded image or video.",
    )
    detail: Literal["auto", "low", "high", "original"] = Field("auto", description=DETAIL)
    prompt_cache_breakpoint: CacheBreakpoint | None = Field(None, description=BREAKPOINT)


class DecisionJsonPart(Schema):
    """JSON, which the prompt shows as text."""

    type: Literal["input_json"]
    data: Annotated[
        Annotated[list[JsonObject], Tag("<list>")] | Annotated[JsonObject, Tag("<object>")],
        Discriminator(form_of),
    ]


DecisionPart = Annotated[
    Annotated[DecisionTextPart, Tag("<input_text>")]
    | Annotated[DecisionImagePart, Tag("<input_image>")]
    | Annotated[DecisionJsonPart, Tag("<input_json>")],
    Discriminator(tag_of("type")),
]
DecisionContent = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[DecisionPart], Field(min_length=1), Tag("<list>")],
    Discriminator(form_of),
]


class OutputTextPart(Schema):
    type: Literal["output_text"]
    text: str


class OutputRefusalPart(Schema):
    """A refusal in an earlier answer, which the prompt shows as text."""

    type: Literal["refusal"]
    refusal: str


OutputPart = Annotated[
    Annotated[OutputTextPart, Tag("<output_text>")] | Annotated[OutputRefusalPart, Tag("<refusal>")],
    Discriminator(tag_of("type")),
]


class DecisionUserMessage(Schema):
    type: Literal["message"] = "message"
    role: Literal["user"]
    content: DecisionContent


class DecisionSystemMessage(Schema):
    type: Literal["message"] = "message"
    role: Literal["system", "developer"]
    content: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[list[DecisionTextPart], Tag("<list>")],
        Discriminator(form_of),
    ]


class DecisionAssistantMessage(Schema):
    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[list[OutputPart], Tag("<list>")],
        Discriminator(form_of),
    ]
    phase: Literal["commentary", "final_answer"] | None = Field(None, description=UNUSED)


def _is_message(item: Any) -> Any:
    if isinstance(item, dict) and "role" not in item and item.get("type", "message") != "message":
        raise PydanticCustomError(NO_SUPPORT, "only messages are supported, which have a role and a content")
    return item


DecisionMessage = Annotated[
    Annotated[DecisionUserMessage, Tag("<user>")]
    | Annotated[DecisionSystemMessage, Tag("<system>")]
    | Annotated[DecisionSystemMessage, Tag("<developer>")]
    | Annotated[DecisionAssistantMessage, Tag("<assistant>")],
    Discriminator(tag_of("role")),
    BeforeValidator(_is_message),
]
DecisionInput = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[DecisionMessage], Field(min_length=1, max_length=MAX_MESSAGES), Tag("<list>")],
    Discriminator(form_of),
]


class QuestionFields(Schema):
    instructions: DecisionContent
    name: str | None = Field(None, max_length=1024, description="A name that the answer repeats.")


class PossibleAnswer(NamedTuple):
    """An answer to a question: its path from the question, its text in a prompt, and its description."""

    path: str
    text: str
    description: str = ""


class PredicateQuestion(QuestionFields):
    """A question for the probability that a statement about the input is true."""

    type: Literal["predicate"]

    @property
    def answers(self) -> list[PossibleAnswer]:
        return [PossibleAnswer("", YES), PossibleAnswer("", NO)]


class DecisionChoice(Schema):
    """A possible answer: a text, or a boolean, which the prompt shows as yes or no."""

    value: Annotated[
        Annotated[CandidateText, Tag("<string>")] | Annotated[bool, Tag("<boolean>")],
        Discriminator(lambda value: "<boolean>" if isinstance(value, bool) else "<string>"),
    ]
    description: str = Field("", description="A description, which the prompt shows.")

    @property
    def text(self) -> str:
        if isinstance(self.value, str):
            return self.value
        return YES if self.value else NO


class ChoiceQuestion(QuestionFields):
    type: Literal["choice"]
    choices: list[DecisionChoice] = Field(min_length=2, max_length=MAX_CANDIDATES)

    @property
    def answers(self) -> list[PossibleAnswer]:
        choices = enumerate(self.choices)
        return [PossibleAnswer(f".choices[{index}].value", each.text, each.description) for index, each in choices]


class ScoreLevel(Schema):
    label: CandidateText
    description: str = Field("", description="A description, which the prompt shows.")


class ScoreQuestion(QuestionFields):
    """A question for a rating, on levels from the lowest to the highest."""

    type: Literal["score"]
    levels: list[ScoreLevel] = Field(min_length=2, max_length=MAX_CANDIDATES)

    @property
    def answers(self) -> list[PossibleAnswer]:
        levels = enumerate(self.levels)
        return [PossibleAnswer(f".levels[{index}].label", each.label, each.description) for index, each in levels]


DecisionQuestion = Annotated[
    Annotated[PredicateQuestion, Tag("<predicate>")]
    | Annotated[ChoiceQuestion, Tag("<choice>")]
    | Annotated[ScoreQuestion, Tag("<score>")],
    Discriminator(tag_of("type")),
]


class PromptCacheOptions(Schema):
    """Options of a prompt cache. Only the defaults are accepted, which match the behaviour of the server."""

    mode: Literal["implicit"] = "implicit"
    ttl: Literal["30m"] = "30m"


class DecisionRequest(ShotsFields, WeighingFields, ConfidenceFields, PrioritizedRequest):
    model_config = with_example(
        input="The water is cold.",
        questions=[
            {"type": "predicate", "instructions": "Is it warm?"},
            {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": True}]},
            {"type": "score", "instructions": "Cold?", "levels": [{"label": "not"}, {"label": "very"}]},
        ],
    )

    input: DecisionInput = Field(description="The input of all questions: a text, or messages with texts and images.")
    questions: list[DecisionQuestion] = Field(min_length=1, max_length=MAX_QUESTIONS)
    method: MethodChoice = Field(
        "auto",
        description="The method of classification for choices with examples. The language model answers all other "
        "questions.",
    )
    template: TemplateChoice = Field(
        "vqa", description="The template, in which `{media}` is the input and `{question}` the instructions."
    )
    prompt_cache_options: PromptCacheOptions = PromptCacheOptions()
    prompt_cache_key: str = Field("", max_length=1024, description=UNUSED)
    safety_identifier: str = Field("", max_length=1024, description=UNUSED)

    @field_validator("questions")
    @classmethod
    def _few_answers(cls, questions: list[DecisionQuestion]) -> list[DecisionQuestion]:
        number = sum(len(question.answers) for question in questions)
        if number > MAX_ANSWERS:
            raise ValueError(f"all questions together have {number} possible answers, the limit is {MAX_ANSWERS}")
        return questions

    @property
    def method_or_default(self) -> MethodChoice:
        is_weighing = "method" not in self.model_fields_set and self._weighing
        return "in_context" if is_weighing else self.method
