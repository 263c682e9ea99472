"""Requests about which examples of a support set matter: its diagnostics, and what to label next."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from server.schemas.base import TimedRequest
from server.schemas.fewshot import MediaFields, Version
from server.schemas.stored import VersionRequest

MAX_POOL = 1024


class DiagnosticsRequest(VersionRequest):
    limit: Annotated[
        int, Field(ge=1, le=1000, strict=False, description="The most entries of each list; counts are of all.")
    ] = 100


class PooledMedia(MediaFields):
    """An image without a label."""

    @model_validator(mode="after")
    def _shows_something(self) -> PooledMedia:
        if self.image is None and not self.media:
            raise ValueError("an image of the pool needs image or media")
        return self


class SuggestRequest(TimedRequest):
    """A pool of images without labels, of which some are to be labelled next."""

    pool: list[PooledMedia] = Field(min_length=1, max_length=MAX_POOL)
    count: int = Field(8, ge=1, le=MAX_POOL, description="Images to suggest.")
    version: Version | None = Field(None, description="The latest one, if not given.")
