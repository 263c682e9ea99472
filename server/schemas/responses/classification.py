"""Responses that weigh candidates: classifications and scores."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from server.schemas.fewshot import Calibration, Normalisation
from server.schemas.responses.base import ListSchema, ResponseSchema, Usage
from server.schemas.responses.completions import FewShotReport


class WeighedCandidate(ResponseSchema):
    label: str
    text: str
    logprob: float = Field(description="The sum over its tokens, before normalisation and calibration.")
    num_tokens: int
    probability: float


class ClassificationReport(FewShotReport):
    normalisation: Normalisation
    calibration: Calibration
    permutations: int = Field(description="Orders of the shots that were computed.")


class Classification(ResponseSchema):
    """The most likely label, and the candidates from the most to the least likely."""

    id: str
    object: Literal["classification"]
    created: int
    model: str
    label: str
    confidence: float
    candidates: list[WeighedCandidate]
    fewshot: ClassificationReport
    usage: Usage


class ScoredContinuation(ResponseSchema):
    index: int
    logprob: float
    num_tokens: int
    token_ids: list[int]
    tokens: list[str]
    token_logprobs: list[float]


class Scores(ResponseSchema):
    """The log-probabilities of the candidates, in the order of the request."""

    id: str
    object: Literal["score"]
    created: int
    model: str
    data: list[ScoredContinuation]
    usage: Usage


class Embedding(ResponseSchema):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or with `base64` little-endian float32 in base64.")


class Embeddings(ListSchema):
    data: list[Embedding]
    model: str
    usage: Usage
