"""The candidates of a classification: those of the request, or the answers of its examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from server.errors import InvalidRequest
from server.schemas.fewshot import MAX_CANDIDATE_LENGTH, MAX_CANDIDATES, CandidateField
from server.store.examples import Answered, Examples


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible answer: its name in the response, and the text that the model would write.

    `param` is its path in the request, for error messages.
    """

    label: str
    text: str
    param: str = field(default="candidates", compare=False)


def read_candidates(fields: Iterable[CandidateField]) -> list[Candidate]:
    """Return the candidates of a request. Raises `InvalidRequest` for two with the same label or the same text."""
    pairs = ((field, field) if isinstance(field, str) else (field.label, field.text) for field in fields)
    candidates = [Candidate(*pair, param=f"candidates[{index}]") for index, pair in enumerate(pairs)]
    for name in ("label", "text"):
        first_index: dict[str, int] = {}
        for index, candidate in enumerate(candidates):
            first = first_index.setdefault(getattr(candidate, name), index)
            if first != index:
                raise InvalidRequest(f"candidates {first} and {index} have the same {name}", param=candidate.param)
    return candidates


def candidates_of(examples: Examples[Answered]) -> list[Candidate]:
    """Return the answers of examples as candidates. Raises `InvalidRequest` if a request could not give these."""
    answers = list(filter(None, examples.by_answer))
    if len(answers) > MAX_CANDIDATES:
        message = f"the examples have {len(answers)} different answers, the limit is {MAX_CANDIDATES}: set candidates"
        raise InvalidRequest(message, param="candidates")
    if (length := max(map(len, answers), default=0)) > MAX_CANDIDATE_LENGTH:
        message = (
            f"an answer of the examples has {length} characters, the limit is {MAX_CANDIDATE_LENGTH}: set candidates"
        )
        raise InvalidRequest(message, param="candidates")
    return read_candidates(answers)
