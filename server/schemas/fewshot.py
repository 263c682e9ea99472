"""What a few-shot request may hold: worked shots or where to take them from, the query, and how both are written."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from server.media.source import kind_of
from server.schemas.base import Schema, tag_of
from server.schemas.media import ImageIdPart, ImageUrlPart, MediaPart, MediaUrl, VideoIdPart, VideoUrlPart

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
    match kind_of(image):
        case "image":
            return ImageIdPart(type="image_id", image_id=image)
        case "video":
            return VideoIdPart(type="video_id", video_id=image)
        case None:
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


class SearchRequest(Schema):
    """Which examples of a support set are most like the query?"""

    model: str | None = None
    query: QueryFields
    version: Version | None = None
    k: int = Field(default=8, ge=1, le=MAX_SHOTS)
    strategy: Comparing = "rices_image"
