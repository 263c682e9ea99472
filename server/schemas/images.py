"""Requests to store images and videos, and to list them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from server.schemas.base import ListRequest, Schema


class UploadRequest(Schema):
    """`data` is base64; `url` is what stands in a prompt's image_url or video_url part. One of the two."""

    data: str | None = None
    url: str | None = None
    object: Literal["image", "video"] = "image"

    @model_validator(mode="after")
    def _one_of_two(self) -> UploadRequest:
        if (self.data is None) == (self.url is None):
            raise ValueError("give one of data and url")
        return self


class UploadForm(Schema):
    """A form with the bytes of an image or a video."""

    file: bytes


class ListImagesRequest(ListRequest):
    object: Literal["image", "video"] | None = None
