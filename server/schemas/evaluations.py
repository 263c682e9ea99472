"""Requests for leave-one-out evaluations of support sets."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.schemas.base import LIMIT, ListRequest, ModelRequest
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
    """A grid of strategies, numbers of shots and seeds; `seed` draws the queries."""

    version: int | None = Field(None, ge=1)
    k: list[Annotated[int, Field(ge=0, le=MAX_SHOTS)]] = Field(
        [], max_length=32, description="Numbers of shots; 0, 1, 2, 4, 8 and 16, if not given."
    )
    strategies: list[Strategy] = Field([], max_length=16)
    seeds: list[Annotated[int, Field(ge=0, le=2**63 - 1)]] = Field(
        [0], min_length=1, max_length=32, description="Each draws the shots and their orders anew."
    )
    order: Order | None = None
    template: TemplateChoice = "classification"
    candidates: list[CandidateField] = Field([], max_length=MAX_CANDIDATES)
    max_queries: int = Field(200, ge=1, le=100_000, description="Of a larger set, this many examples are left out.")


class ListEvaluationsRequest(ListRequest):
    limit: Annotated[int, Field(ge=1, le=100, strict=False, description=LIMIT)] = 20
    support_set: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(None, description="Its id.")
