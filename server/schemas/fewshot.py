"""What a few-shot request may hold: worked shots or where to take them from, the query, and how both are written."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, GetJsonSchemaHandler, Tag, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from server.fewshot.scoring import Calibration, ContentFree, Normalisation, Weighing
from server.media.source import PREFIXES
from server.schemas.base import ModelRequest, PrioritizedRequest, Schema, tag_of
from server.schemas.generation import CompletionFields
from server.schemas.prompt import (
    ImageIdPart,
    ImageUrlPart,
    MediaPart,
    MediaUrl,
    Prompt,
    VideoIdPart,
    VideoUrlPart,
    stored_media_part,
)

MAX_SHOTS = 1024
MAX_TEMPLATE = 16384

Comparing = Literal["rices_image", "rices_text", "mixed"]
Strategy = Literal["first", "random", "balanced", Comparing]
Order = Literal["as_selected", "similar_last", "stored", "shuffled"]

Name = Annotated[str, Field(min_length=1, max_length=128)]
Version = Annotated[int, Field(ge=1, le=2**31 - 1)]
ShownPart = Annotated[
    Annotated[ImageUrlPart, Tag("<image_url>")]
    | Annotated[VideoUrlPart, Tag("<video_url>")]
    | Annotated[ImageIdPart, Tag("<image_id>")]
    | Annotated[VideoIdPart, Tag("<video_id>")],
    Discriminator(tag_of("type")),
]


class MediaFields(Schema):
    """Media in one of two forms: `media`, parts as in a prompt, or `image`, the URL or id of one."""

    image: str | None = Field(default=None, min_length=1)
    media: list[ShownPart] = Field(default=[], max_length=64)

    @model_validator(mode="after")
    def _one_form(self) -> MediaFields:
        if self.image is not None and self.media:
            raise ValueError("image and media are two forms of one field: give one")
        return self

    def parts(self) -> list[MediaPart]:
        return list(self.media) if self.image is None else [_part(self.image)]


def _part(image: str) -> MediaPart:
    if image.startswith(tuple(PREFIXES.values())):
        return stored_media_part(image)
    return ImageUrlPart(type="image_url", image_url=MediaUrl(url=image))


class ShotFields(MediaFields):
    """`answer` is another name of `text`."""

    id: Name | None = None
    text: str = ""
    question: str = ""
    label: str = ""

    @model_validator(mode="before")
    @classmethod
    def _answer_is_text(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("answer") is None:
            return values
        if values.get("text") is not None:
            raise ValueError("text and answer are two names of one field: give one")
        return {("text" if key == "answer" else key): value for key, value in values.items() if key != "text"}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        reference = super().__get_pydantic_json_schema__(schema, handler)
        fields = handler.resolve_ref_schema(reference)["properties"]
        fields["answer"] = {**fields["text"], "description": "Another name of `text`."}
        return reference


class QueryFields(MediaFields):
    text: str = ""
    question: str = ""


class ExamplesFields(Schema):
    """Shots out of a support set. Without a version, the set's last."""

    support_set: Name
    version: Version | None = None
    k: int | None = Field(default=None, ge=0, le=MAX_SHOTS)
    strategy: Strategy = "first"
    order: Order | None = None
    seed: int = Field(default=0, ge=0, le=2**63 - 1)


class TemplateFields(Schema):
    """A template of the client's own; see `server.fewshot.templates`."""

    shot: str = Field(min_length=1, max_length=MAX_TEMPLATE)
    query: str = Field(default="", max_length=MAX_TEMPLATE)
    separator: str = Field(default="", max_length=1024)
    end: str = Field(default="", max_length=1024)


TemplateChoice = Annotated[
    Annotated[Name, Tag("<name>")] | Annotated[TemplateFields, Tag("<template>")],
    Discriminator(lambda value: "<name>" if isinstance(value, str) else "<template>"),
]


class FewShotFields(Schema):
    """The same for every route that shows the model worked shots before it asks."""

    shots: list[ShotFields] = Field(default=[], max_length=MAX_SHOTS)
    examples: ExamplesFields | None = None
    query: QueryFields
    template: TemplateChoice = "caption"
    # the paper's "zero-shot": shots are shown without their media, and tell the form of an answer alone
    zero_shot: bool = False
    # the first shots are left out if the model's context has no room for all
    truncate_shots: bool = False


class FewShotCompletionRequest(CompletionFields, FewShotFields):
    pass


class SearchRequest(ModelRequest):
    """A search for the examples of a support set that are most similar to a query."""

    query: QueryFields
    version: Version | None = None
    k: int = Field(default=8, ge=1, le=MAX_SHOTS)
    strategy: Comparing = "rices_image"


MAX_CANDIDATES = 1024
MAX_PERMUTATIONS = 24

CandidateText = Annotated[str, Field(min_length=1, max_length=4096)]


class LabelledCandidate(Schema):
    """`label` names it in the answer, `text` is what the model would write."""

    label: Annotated[str, Field(min_length=1, max_length=256)]
    text: CandidateText


CandidateField = Annotated[
    Annotated[CandidateText, Tag("<string>")] | Annotated[LabelledCandidate, Tag("<candidate>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<candidate>"),
]


class WeighingFields(Schema):
    """How the scores of candidates become probabilities."""

    normalisation: Normalisation = "sum"
    calibration: Calibration = "none"
    content_free: ContentFree = "grey"
    permutations: int = Field(1, ge=1, le=MAX_PERMUTATIONS)
    seed: int = Field(0, ge=0, le=2**63 - 1)

    def weighing(self) -> Weighing:
        return Weighing(
            normalisation=self.normalisation,
            calibration=self.calibration,
            content_free=self.content_free,
            permutations=self.permutations,
            seed=self.seed,
        )


class ClassifyRequest(FewShotFields, WeighingFields, PrioritizedRequest):
    template: TemplateChoice = "classification"
    candidates: list[CandidateField] = Field([], max_length=MAX_CANDIDATES)
    top_k: int | None = Field(None, ge=1, le=MAX_CANDIDATES)


ScoredCandidate = Annotated[
    Annotated[CandidateText, Tag("<string>")]
    | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=4096), Tag("<token ids>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<token ids>"),
]


class ScoreRequest(PrioritizedRequest):
    prompt: Prompt
    candidates: list[ScoredCandidate] = Field(min_length=1, max_length=MAX_CANDIDATES)
