"""What may be asked about candidates: how likely each is as the answer, behind worked shots or behind a plain prompt."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from server.fewshot.candidates import Candidate
from server.fewshot.scoring import Calibration, ContentFree, Normalisation, Weighing
from server.schemas.base import Schema
from server.schemas.completions import Prompt
from server.schemas.fewshot import FewShotFields, TemplateChoice

MAX_CANDIDATES = 1024
MAX_PERMUTATIONS = 24

CandidateText = Annotated[str, Field(min_length=1, max_length=4096)]


class LabelledCandidate(Schema):
    """`label` names it in the answer, `text` is what the model would write."""

    label: Annotated[str, Field(min_length=1, max_length=256)]
    text: CandidateText


CandidateField = Annotated[
    Annotated[CandidateText, Tag("<string>")] | Annotated[LabelledCandidate, Tag("<candidate>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<candidate>"),
]


class WeighingFields(Schema):
    """How the scores of candidates become probabilities."""

    normalisation: Normalisation = "sum"
    calibration: Calibration = "none"
    content_free: ContentFree = "grey"
    permutations: int = Field(1, ge=1, le=MAX_PERMUTATIONS)
    seed: int = Field(0, ge=0, le=2**63 - 1)

    def weighing(self) -> Weighing:
        return Weighing(
            normalisation=self.normalisation,
            calibration=self.calibration,
            content_free=self.content_free,
            permutations=self.permutations,
            seed=self.seed,
        )


class ClassifyRequest(FewShotFields, WeighingFields):
    model: str | None = None
    template: TemplateChoice = "classification"
    candidates: list[CandidateField] = Field([], max_length=MAX_CANDIDATES)
    top_k: int | None = Field(None, ge=1, le=MAX_CANDIDATES)
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1)
    request_id: str | None = Field(None, pattern=r"^[\w.:-]{1,128}$")
    user: str | None = Field(None, max_length=256)


ScoredCandidate = Annotated[
    Annotated[CandidateText, Tag("<string>")]
    | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=4096), Tag("<token ids>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<token ids>"),
]


class ScoreRequest(Schema):
    model: str | None = None
    prompt: Prompt
    candidates: list[ScoredCandidate] = Field(min_length=1, max_length=MAX_CANDIDATES)
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1)
    request_id: str | None = Field(None, pattern=r"^[\w.:-]{1,128}$")
    user: str | None = Field(None, max_length=256)


def candidates_of(fields: list[CandidateField]) -> list[Candidate]:
    return [Candidate(one, one) if isinstance(one, str) else Candidate(one.label, one.text) for one in fields]
