"""Responses about stored images and videos."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.schemas.responses.base import PageSchema, ResponseSchema


class StoredImage(ResponseSchema):
    """A stored image or video. `width`, `height` and `frames` are null if it was stored undecoded."""

    id: str
    object: Literal["image", "video"]
    bytes: int
    media_type: str
    width: int | None = Field(description="In pixels, of the first frame.")
    height: int | None
    frames: int | None
    created_at: int = Field(description="In Unix seconds.")


class StoredImages(PageSchema):
    data: list[StoredImage]
