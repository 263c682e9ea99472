"""Requests to look inside the model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.schemas.base import TrackedRequest
from server.schemas.prompt import Prompt


class InspectRequest(TrackedRequest):
    """`token` is a position in prompt and answer; `layers` are gated layers, named by the layer that each precedes."""

    prompt: Prompt
    answer: str = Field("", max_length=2**16)
    token: int | None = Field(None, ge=0, le=2**31 - 1)
    layers: list[Annotated[int, Field(ge=0)]] = Field([], max_length=256)
