"""Scores a trained model: after four shots, it has to choose the kind of a held-out image among all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch

from model.batch import NO_CACHE
from model.flamingo import Flamingo
from model.prompt import PromptTokenizer
from training.ablations.data import Kinds, Query, query_example
from training.batch import collate
from training.bridge import BridgeLoss
from training.mixture import PreparedExample, merge_media

# prompts per forward, each with every candidate
QUERIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    correct: tuple[bool, ...]  # for each query, whether its correct candidate is the most likely one
    loss: float  # loss of the correct candidate's tokens and the chunk's end, in nats per token, mean over queries

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def digits(self) -> str:
        """One digit per query, 1 for a correct answer."""
        return "".join(str(int(is_correct)) for is_correct in self.correct)


def score(model: Flamingo, tokenizer: PromptTokenizer, kinds: Kinds, queries: Sequence[Query]) -> Score:
    groups = [
        [kinds.prepare(query_example(query, name), tokenizer, Random(0)) for name in kinds.names] for query in queries
    ]
    return score_candidates(model, groups, [kinds.names.index(query.kind) for query in queries])


def score_candidates(model: Flamingo, groups: Sequence[Sequence[PreparedExample]], correct: Sequence[int]) -> Score:
    """Score queries: a group is one prompt with every candidate, and `correct` has the index of the right one."""
    losses = [
        candidates
        for first in range(0, len(groups), QUERIES)
        for candidates in _candidate_losses(model, groups[first : first + QUERIES])
    ]
    return Score(
        correct=tuple(row.index(min(row)) == index for row, index in zip(losses, correct, strict=True)),
        loss=sum(row[index] for row, index in zip(losses, correct, strict=True)) / len(losses),
    )


@torch.inference_mode()
def _candidate_losses(model: Flamingo, groups: Sequence[Sequence[PreparedExample]]) -> list[list[float]]:
    """Return each candidate's loss, in one forward.

    Losses are means per token, so that long names are not at a disadvantage.
    """
    examples = [example for group in groups for example in group]
    all_previous = model.config.gated.attends == "all_previous"
    device = model.language_model.embed.weight.device
    tokens = [example.tokens for example in examples]
    batch = collate(tokens, merge_media(examples), device, all_previous=all_previous)
    pages = BridgeLoss(model).visual_tokens(batch.media)
    logits = model(batch.batch, NO_CACHE, model.fresh_media(pages)).float()
    losses = -logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    means = iter([float(part.mean()) for part in losses.split([sequence.num_targets for sequence in tokens])])
    return [[next(means) for _ in group] for group in groups]
