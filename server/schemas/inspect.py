"""Requests to look inside the model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.schemas.base import TrackedRequest
from server.schemas.prompt import Prompt


class InspectRequest(TrackedRequest):
    """A prompt, an answer, and the token of the two to look at."""

    prompt: Prompt
    answer: str = Field("", max_length=2**16, description="The text after the prompt.")
    token: int | None = Field(None, ge=0, le=2**31 - 1, description="Its position; the last, if not given.")
    layers: list[Annotated[int, Field(ge=0)]] = Field(
        [],
        max_length=256,
        description="Gated layers, by the language-model layers after them; the mean of all, if not given.",
    )
