"""Few-shot requests: shots or a support set to take them from, the query, and the template that writes them."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, GetJsonSchemaHandler, Tag, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from model.prior import LikenessMethodName
from server.schemas.base import FieldError, PrioritizedRequest, Schema, TimedRequest, form_of, tag_of, with_example
from server.schemas.generation import CompletionFields
from server.schemas.prompt import AttentionFields, MediaPartOrUrl, Prompt, TaggedMediaPart

MAX_SHOTS = 1024
MAX_TEMPLATE = 16384

Comparing = Literal["rices_image", "rices_text", "mixed"]
Strategy = Literal["first", "random", "balanced", Comparing]
Order = Literal["as_selected", "similar_last", "stored", "shuffled"]
Normalisation = Literal["sum", "mean"]
Calibration = Literal["none", "contextual"]
# the methods in which the language model takes no part
ByLikeness = LikenessMethodName
# how a classification uses the examples
Method = Literal["in_context", ByLikeness, "blend"]
MethodChoice = Literal[Method, "auto"]
# the media of a content-free query
ContentFree = Literal["grey", "no_media", "both"]

Name = Annotated[str, Field(min_length=1, max_length=128)]
Version = Annotated[int, Field(ge=1, le=2**31 - 1)]
VERSION = "A version of the set. Default: the latest."
StoredOrSentPart = Annotated[TaggedMediaPart, Discriminator(tag_of("type"))]


class MediaFields(Schema):
    """Media in one of two forms: `media`, parts as in a prompt, or `image`, the URL or id of one image."""

    image: str | None = Field(
        None,
        min_length=1,
        description="Instead of `media`: the URL of an image, or the id of an uploaded image or video.",
    )
    media: list[StoredOrSentPart] = Field([], max_length=64, description="Images and videos, as in a prompt.")

    @model_validator(mode="after")
    def _one_form(self) -> MediaFields:
        if self.image is not None and self.media:
            raise ValueError("give either image or media")
        return self

    def parts(self, param: str) -> dict[str, MediaPartOrUrl]:
        """Return the parts by their path in the request, in which these fields are `param`."""
        if self.image is not None:
            return {f"{param}.image": self.image}
        return {f"{param}.media[{number}]": part for number, part in enumerate(self.media)}


class ShotFields(MediaFields):
    """A worked example."""

    id: Name | None = Field(None, description="A name that the response repeats.")
    text: str = Field("", description="The text of the answer.")
    question: str = Field("", description="The question.")
    label: str = Field("", description="The label of the answer. One of `text` and `label` is enough.")

    @classmethod
    @cache
    def names(cls) -> frozenset[str]:
        return super().names() | {"answer"}

    @model_validator(mode="before")
    @classmethod
    def _answer_is_text(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("answer") is None:
            return values
        if values.get("text") is not None:
            raise ValueError("give either text or answer")
        return {("text" if key == "answer" else key): value for key, value in values.items() if key != "text"}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        reference = super().__get_pydantic_json_schema__(schema, handler)
        fields = handler.resolve_ref_schema(reference)["properties"]
        fields["answer"] = {**fields["text"], "description": "Another name for `text`."}
        return reference


class QueryFields(MediaFields):
    text: str = Field("", description="A text that the template shows or a strategy compares.")
    question: str = Field("", description="A question that the template shows or a strategy compares.")


class ExamplesFields(Schema):
    """Shots that are selected from a support set."""

    such_as = 'such as {"support_set": "birds"}'
    support_set: Name = Field(description="The id or name of the set.")
    version: Version | None = Field(None, description=VERSION)
    k: int | None = Field(
        None,
        ge=0,
        le=MAX_SHOTS,
        description="Number of examples, at most all of the set. Default: 4, and 2 with `zero_shot`. If `strategy` is "
        "`balanced` by default, it is the number of candidates or labels, from 4 to 16. All of a smaller set.",
    )
    strategy: Strategy = Field(
        "first", description="How examples are selected. Default for a set whose examples all have labels: `balanced`."
    )
    order: Order | None = Field(
        None, description="Order of the examples in the prompt. The default depends on the strategy."
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of random selection and order.")


class TemplateFields(Schema):
    """A template with the placeholders `{media}`, `{text}`, `{question}`, `{answer}` and `{label}`."""

    shot: str = Field(min_length=1, max_length=MAX_TEMPLATE, description="A shot with its answer.")
    query: str = Field("", max_length=MAX_TEMPLATE, description="The query. Default: `shot` up to its answer.")
    separator: str = Field("", max_length=1024, description="Text after each shot.")
    end: str = Field(
        "", max_length=1024, description="The end of an answer. Default: the model's end of chunk, or a line break."
    )


TemplateChoice = Annotated[
    Annotated[Name, Tag("<string>")] | Annotated[TemplateFields, Tag("<object>")],
    Discriminator(form_of),
]


class ShotsFields(AttentionFields):
    """The fields of every route that may show the model shots."""

    shots: list[ShotFields] = Field([], max_length=MAX_SHOTS, description="Worked examples, in prompt order.")
    examples: ExamplesFields | None = Field(None, description="Instead of `shots`: examples from a support set.")
    zero_shot: bool = Field(
        False,
        description='Write the shots without their media, to show only the form of an answer ("zero-shot" in the paper).',
    )
    truncate_shots: bool = Field(
        False, description="If the context has no room for all shots, leave out the first ones."
    )

    @property
    def compares_media(self) -> bool:
        """True if the media of the query may be compared with all examples, whichever become shots."""
        return False


class FewShotFields(ShotsFields):
    """The fields of every route that shows the model shots before a query."""

    query: QueryFields
    template: TemplateChoice = "caption"

    @property
    def has_prompt(self) -> bool:
        """True if the language model may take part, so that shots and query have to suit the template."""
        return True


EXAMPLE = {
    "shots": [{"question": "2 + 2?", "text": "4"}, {"question": "3 + 3?", "text": "6"}],
    "query": {"question": "1 + 1?"},
    "template": {"shot": "{question} {answer}\n"},
}


class FewShotCompletionRequest(CompletionFields, FewShotFields):
    model_config = with_example(**EXAMPLE, max_tokens=8)


class SearchRequest(TimedRequest):
    """A search for the examples of a support set that are most similar to a query."""

    query: QueryFields
    version: Version | None = Field(None, description=VERSION)
    k: int = Field(8, ge=1, le=MAX_SHOTS, description="Number of examples. A smaller set returns all of its examples.")
    strategy: Comparing = Field("rices_image", description="What is compared: images, texts, or both.")


MAX_CANDIDATES = 1024
MAX_CANDIDATE_LENGTH = 4096
# All labels of a set are in its description.
MAX_LABEL = 1024
MAX_PERMUTATIONS = 24
MAX_TEMPERATURE = 1000

CandidateText = Annotated[str, Field(min_length=1, max_length=MAX_CANDIDATE_LENGTH)]


class LabelledCandidate(Schema):
    """A candidate with a name for the response, and the text that the model would write."""

    label: Annotated[str, Field(min_length=1, max_length=MAX_LABEL)]
    text: CandidateText


CandidateField = Annotated[
    Annotated[CandidateText, Tag("<string>")] | Annotated[LabelledCandidate, Tag("<object>")],
    Discriminator(form_of),
]


class WeighingFields(Schema):
    """Options that turn the scores of candidates into probabilities; `permutations` counts the original order too."""

    normalisation: Normalisation = Field(
        "sum", description="How the log-probabilities of a candidate's tokens are combined."
    )
    calibration: Calibration = Field(
        "none", description="`contextual` divides each probability by the one after a query without content."
    )
    content_free: ContentFree = Field("grey", description="The media of the query without content; `both` is a mean.")
    permutations: int = Field(
        1,
        ge=1,
        le=MAX_PERMUTATIONS,
        description="Number of orders of the shots to average over: the given order and random ones.",
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of the random orders.")

    @property
    def _weighing(self) -> list[str]:
        return sorted(self.model_fields_set & WeighingFields.model_fields.keys())


class ConfidenceFields(Schema):
    """Options that control the confidence of an answer, and when an answer has no label."""

    temperature: float | None = Field(
        None,
        gt=0,
        le=MAX_TEMPERATURE,
        description="Divides the log-probabilities. Default: fitted to left-out examples, where possible.",
    )
    target_accuracy: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Return a label only if labels with this confidence are expected to be at least this accurate.",
    )
    target_coverage: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Return a label for this share of queries, those with the highest confidence.",
    )

    @model_validator(mode="after")
    def _one_target(self) -> ConfidenceFields:
        if self.target_accuracy is not None and self.target_coverage is not None:
            raise FieldError("give either target_accuracy or target_coverage", param="target_coverage")
        return self

    @property
    def target(self) -> tuple[str, float] | None:
        """The name and the value of the target that is set."""
        targets = {"target_accuracy": self.target_accuracy, "target_coverage": self.target_coverage}
        return next(((name, value) for name, value in targets.items() if value is not None), None)


# the fields of `examples` that select shots
SELECTING = {"k", "strategy", "order", "seed"}


class ClassifyRequest(FewShotFields, WeighingFields, ConfidenceFields, PrioritizedRequest):
    model_config = with_example(**EXAMPLE, candidates=["2", "3"])

    method: MethodChoice = Field(
        "auto",
        description="How examples are used: as shots of a prompt (`in_context`), by comparing image vectors "
        "(`nearest_mean`, `knn`, `linear`), both (`blend`), or as the server chooses (`auto`). If the request sets "
        "`normalisation`, `calibration`, `content_free`, `permutations` or `seed`, the default is `in_context`.",
    )
    template: TemplateChoice = "classification"
    candidates: list[CandidateField] = Field(
        [],
        max_length=MAX_CANDIDATES,
        description="The possible answers. Default: the labels of the support set or of the shots.",
    )
    top_k: int | None = Field(
        None, ge=1, le=MAX_CANDIDATES, description="Number of candidates in the response. Default: all."
    )

    @model_validator(mode="after")
    def _no_prompt_has_no_options(self) -> ClassifyRequest:
        if self.has_prompt:
            return self
        if weighing := self._weighing:
            message = f"belongs to the language model, which takes no part in the method {self.method}"
            raise FieldError(message, param=weighing[0])
        if "shots_attend" in self.model_fields_set:
            message = f"is the form of a prompt, which the method {self.method} does not have"
            raise FieldError(message, param="shots_attend")
        if self.examples is not None and (selecting := sorted(self.examples.model_fields_set & SELECTING)):
            message = f"selects shots of a prompt; the method {self.method} compares the query with all examples"
            raise FieldError(message, param=f"examples.{selecting[0]}")
        return self

    @property
    def method_or_default(self) -> MethodChoice:
        is_weighing = "method" not in self.model_fields_set and self._weighing
        return "in_context" if is_weighing else self.method

    @property
    def has_prompt(self) -> bool:
        return self.method not in get_args(ByLikeness)

    @property
    def compares_media(self) -> bool:
        return self.method_or_default != "in_context"


ScoredCandidate = Annotated[
    Annotated[CandidateText, Tag("<string>")]
    | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=4096), Tag("<list>")],
    Discriminator(form_of),
]


class ScoreRequest(AttentionFields, PrioritizedRequest):
    model_config = with_example(prompt="A flamingo is", candidates=[" a bird", " a fish"])

    prompt: Prompt
    candidates: list[ScoredCandidate] = Field(
        min_length=1, max_length=MAX_CANDIDATES, description="Continuations of the prompt: texts or lists of token ids."
    )
