"""Requests to store images and videos, and to list them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from server.schemas.base import ListRequest, Schema


class UploadRequest(Schema):
    """An upload as JSON: `data` in base64, or a `url` as in a prompt's image_url or video_url part."""

    data: str | None = None
    url: str | None = None
    object: Literal["image", "video"] = "image"

    @model_validator(mode="after")
    def _one_of_two(self) -> UploadRequest:
        if (self.data is None) == (self.url is None):
            raise ValueError("give either data or url")
        return self


class ListImagesRequest(ListRequest):
    object: Literal["image", "video"] | None = None
