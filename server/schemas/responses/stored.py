"""Responses about what is stored: images and videos, and support sets with their examples and versions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from server.schemas.fewshot import Comparing
from server.schemas.prompt import ImageIdPart, VideoIdPart
from server.schemas.responses.base import ListSchema, PageSchema, ResponseSchema


class StoredImage(ResponseSchema):
    """A stored image or video. `width`, `height` and `frames` are null if it was stored without decoding."""

    id: str
    object: Literal["image", "video"]
    bytes: int
    media_type: str
    width: int | None = Field(description="The width of the first frame in pixels.")
    height: int | None = Field(description="The height of the first frame in pixels.")
    frames: int | None
    created_at: int = Field(description="Unix time in seconds.")


class StoredImages(PageSchema):
    data: list[StoredImage]


class Warmth(ResponseSchema):
    """The parts of a version that the worker of this server has computed in advance."""

    status: Literal["warming", "ready", "failed"]
    num_media: int
    media_encoded: int = Field(description="Media that were encoded now.")
    media_cached: int = Field(description="Media that were in the cache.")
    media_embedded: int = Field(description="Media that have a vector now.")
    texts_embedded: int = Field(description="Texts that have a vector now.")
    prompt_tokens: int = Field(description="Tokens of the computed shots.")
    shots: int = Field(description="The number of computed shots that attend alone.")
    shot_bytes: int = Field(description="The memory of their keys and values, in bytes.")
    error: str | None


class SupportSet(ResponseSchema):
    """A version of a support set, without its examples. Times are Unix times in seconds."""

    id: str
    object: Literal["support_set"]
    name: str | None
    version: int
    latest_version: int
    created_at: float
    updated_at: float
    expires_at: float | None
    pinned: bool
    metadata: dict[str, Any]
    num_examples: int
    num_media: int
    bytes: int = Field(description="The size of all media in bytes, each counted once.")
    label_counts: dict[str, int]
    status: Literal["pending", "warming", "ready", "failed"]
    warm: Warmth | None


class ChangedSupportSet(SupportSet):
    example_ids: list[str] = Field(description="The ids of the stored examples, in the order of the request.")


class SupportSets(PageSchema):
    data: list[SupportSet]


class Version(ResponseSchema):
    object: Literal["support_set.version"]
    version: int
    created_at: float
    num_examples: int
    num_added: int
    num_replaced: int
    num_removed: int


class Versions(ListSchema):
    data: list[Version]
    has_more: bool


class StoredExample(ResponseSchema):
    """A worked example. Without `object` and `score` it can be sent as an example of another support set."""

    id: str
    object: Literal["support_set.example"]
    media: list[Annotated[ImageIdPart | VideoIdPart, Field(discriminator="type")]]
    text: str
    question: str
    label: str
    metadata: dict[str, Any]


class StoredExamples(PageSchema):
    data: list[StoredExample]
    version: int


class SimilarExample(StoredExample):
    score: float = Field(description="The similarity to the query, from -1 to 1.")


class SimilarExamples(ListSchema):
    """The most similar examples, the most similar first."""

    support_set: str
    version: int
    strategy: Comparing
    data: list[SimilarExample]
    examples_left_out: int = Field(
        description="The number of examples that are not in `data`, because the texts of those before fill a page."
    )
