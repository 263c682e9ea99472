"""How a request names a media: by a URL, or by the id of one that is stored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from server.schemas.base import Schema

# short enough to be told back; whether it names a media is the store's business
MediaId = Annotated[str, Field(min_length=1, max_length=128)]


class MediaUrl(Schema):
    url: str
    # OpenAI's hint on resolution: a Flamingo reads every picture at its encoder's one size
    detail: Literal["auto", "low", "high"] = "auto"


class ImageUrlPart(Schema):
    type: Literal["image_url"]
    image_url: MediaUrl


class VideoUrlPart(Schema):
    type: Literal["video_url"]
    video_url: MediaUrl


class ImageIdPart(Schema):
    type: Literal["image_id"]
    image_id: MediaId


class VideoIdPart(Schema):
    type: Literal["video_id"]
    video_id: MediaId


MediaPart = ImageUrlPart | VideoUrlPart | ImageIdPart | VideoIdPart
