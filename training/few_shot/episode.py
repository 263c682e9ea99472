"""Episodes that teach words: media items with their words, then a last item whose word is the answer.

In training, every word that the episode has taught before is a target. In evaluation, only the last word is a target, and
the words of the episode are the candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from torch import Tensor

from model.batch import NO_CACHE
from model.flamingo import Flamingo
from model.prompt import EndOfChunk, Media, PromptTokenizer, Segment, Text
from training.batch import collate
from training.bridge import BridgeLoss
from training.examples import Example, Limits, tokenize
from training.few_shot.language import token_of
from training.mixture import PreparedExample, merge_media

LIMITS = Limits(max_tokens=256, max_media=64)
# the paper's number of images per sequence
MAX_MEDIA = 5
QUERIES_PER_FORWARD = 16


@dataclass(frozen=True, slots=True)
class Shot:
    """A media item, by its digest, with its word."""

    digest: bytes
    word: str
    is_target: bool


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt whose last word is the answer, one of `candidates`."""

    example: PreparedExample
    candidates: tuple[int, ...]  # token ids
    correct: int  # an index into candidates


def prepare(
    name: str, shots: Sequence[Shot], media: Mapping[bytes, Tensor], tokenizer: PromptTokenizer
) -> PreparedExample:
    segments: list[Segment] = []
    answers: set[int] = set()
    for shot in shots:
        segments += (Media(shot.digest), Text(f" {shot.word}"), EndOfChunk())
        if shot.is_target:
            answers.add(len(segments) - 2)
    example = Example(name=name, segments=tuple(segments), answers=frozenset(answers))
    return PreparedExample(tokenize(example, tokenizer, LIMITS, Random(0)), media)


def mark_taught(pairs: Sequence[tuple[bytes, str]]) -> list[Shot]:
    """Return shots in which a word is a target if it occurred before."""
    words = [word for _, word in pairs]
    return [Shot(digest, word, word in words[:position]) for position, (digest, word) in enumerate(pairs)]


def ask(
    name: str,
    shots: Sequence[tuple[bytes, str]],
    query: tuple[bytes, str],
    words: Sequence[str],
    media: Mapping[bytes, Tensor],
    tokenizer: PromptTokenizer,
) -> Question:
    """Return the question for the word of `query`, after the shots."""
    prompt = [*(Shot(digest, word, False) for digest, word in shots), Shot(*query, True)]
    candidates = tuple(token_of(word, tokenizer) for word in words)
    return Question(prepare(name, prompt, media, tokenizer), candidates, words.index(query[1]))


@torch.inference_mode()
def answer(model: Flamingo, questions: Iterable[Question]) -> str:
    """Return one digit per question, 1 if its correct word is the most likely candidate."""
    digits = ""
    remaining = iter(questions)
    while part := list(islice(remaining, QUERIES_PER_FORWARD)):
        logits = answer_logits(model, [question.example for question in part])
        for question, row in zip(part, logits, strict=True):
            best = int(row[list(question.candidates)].argmax())
            digits += str(int(best == question.correct))
    return digits


def answer_logits(model: Flamingo, examples: Sequence[PreparedExample]) -> Tensor:  # -> [Q, V + A]
    batch = collate(
        [example.tokens for example in examples],
        merge_media(examples),
        model.language_model.embed.weight.device,
        all_previous=model.config.gated.attends == "all_previous",
    )
    pages = BridgeLoss(model).visual_tokens(batch.media)
    return model(batch.batch, NO_CACHE, model.fresh_media(pages)).float()
