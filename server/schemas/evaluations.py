"""Requests for leave-one-out evaluations of support sets."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.schemas.base import ListRequest, ModelRequest
from server.schemas.fewshot import (
    MAX_CANDIDATES,
    MAX_SHOTS,
    CandidateField,
    Order,
    Strategy,
    TemplateChoice,
    WeighingFields,
)


class EvaluateRequest(WeighingFields, ModelRequest):
    """`seed` draws the subsample; each of `seeds` draws shots, and their orders."""

    version: int | None = Field(None, ge=1)
    k: list[Annotated[int, Field(ge=0, le=MAX_SHOTS)]] = Field([], max_length=32)
    strategies: list[Strategy] = Field([], max_length=16)
    seeds: list[Annotated[int, Field(ge=0, le=2**63 - 1)]] = Field([0], min_length=1, max_length=32)
    order: Order | None = None
    template: TemplateChoice = "classification"
    candidates: list[CandidateField] = Field([], max_length=MAX_CANDIDATES)
    max_queries: int = Field(200, ge=1, le=100_000)


class ListEvaluationsRequest(ListRequest):
    limit: Annotated[int, Field(ge=1, le=100, strict=False)] = 20
    support_set: Annotated[str, Field(min_length=1, max_length=128)] | None = None
