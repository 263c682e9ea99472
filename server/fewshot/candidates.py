"""The answers that are weighed against each other, and their ids as the prompt would be continued.

A candidate's ids are what follows the prompt's own ids when both are encoded as one text, as an answered shot is. Where
the tokenizer would merge across the border, so that the prompt's ids are no longer there, the candidate is encoded apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from model.prompt import Segment, Text, encode
from model.tokenizer import PromptTokenizer


@dataclass(frozen=True, slots=True)
class Candidate:
    """What it is called, and what the model would write."""

    label: str
    text: str


def distinct(labels: Iterable[str]) -> list[Candidate]:
    """One for each label, in the order of their first appearance; an empty label is none."""
    return [Candidate(label, label) for label in dict.fromkeys(labels) if label]


def continuation_ids(segments: Sequence[Segment], continuation: str, tokenizer: PromptTokenizer) -> list[int]:
    """Ids of `continuation` behind a prompt of these segments; they are never ids of the prompt."""
    tail = _from_last_marker(segments)
    prompt = encode(tail, tokenizer).token_ids if tail else []
    joined = encode(_continued(tail, continuation), tokenizer).token_ids
    if joined[: len(prompt)] == prompt:
        return joined[len(prompt) :]
    return tokenizer.encode_plain(continuation)


def _from_last_marker(segments: Sequence[Segment]) -> list[Segment]:
    """A marker is an id of its own, so what stands before the last one has no say in what follows it."""
    marks = [place for place, segment in enumerate(segments) if not isinstance(segment, Text)]
    return list(segments[marks[-1] :]) if marks else list(segments)


def _continued(segments: Sequence[Segment], continuation: str) -> list[Segment]:
    """In the same text where the prompt ends with one: some families trim a text, or put a token between two."""
    match segments:
        case [*before, Text(text)]:
            return [*before, Text(text + continuation)]
        case _:
            return [*segments, Text(continuation)]
