"""Requests to store images and videos, and to list them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from server.schemas.base import ListRequest, Schema


class UploadRequest(Schema):
    """An image or a video, as `data` or as `url`."""

    data: str | None = Field(None, description="The bytes in base64.")
    url: str | None = Field(None, description="As in a prompt.")
    object: Literal["image", "video"] = "image"

    @model_validator(mode="after")
    def _one_of_two(self) -> UploadRequest:
        if (self.data is None) == (self.url is None):
            raise ValueError("give either data or url")
        return self


class UploadForm(Schema):
    """A form with the bytes of an image or a video."""

    file: bytes


class ListImagesRequest(ListRequest):
    object: Literal["image", "video"] | None = Field(None, description="List these alone.")
