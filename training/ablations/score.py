"""A trained model is scored by naming the kind of a held-out image after four shots, among all kinds."""

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
from training.mixture import merge_media


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    accuracy: float  # share of queries whose correct kind is the most likely candidate
    loss: float  # of the correct kind's tokens and the chunk's end, nats per token, mean over queries


def score(model: Flamingo, tokenizer: PromptTokenizer, kinds: Kinds, queries: Sequence[Query]) -> Score:
    results = [_score_query(model, tokenizer, kinds, query) for query in queries]
    return Score(
        accuracy=sum(is_correct for is_correct, _ in results) / len(results),
        loss=sum(loss for _, loss in results) / len(results),
    )


@torch.inference_mode()
def _score_query(model: Flamingo, tokenizer: PromptTokenizer, kinds: Kinds, query: Query) -> tuple[bool, float]:
    """Return whether the correct kind wins, and its loss.

    One forward runs every candidate after the same prompt. Losses are means per token, so that a long name is at no
    disadvantage.
    """
    examples = [kinds.prepare(query_example(query, name), tokenizer, Random(0)) for name in kinds.names]
    all_previous = model.config.gated.attends == "all_previous"
    device = model.language_model.embed.weight.device
    tokens = [example.tokens for example in examples]
    batch = collate(tokens, merge_media(examples), device, all_previous=all_previous)
    pages = BridgeLoss(model).visual_tokens(batch.media)
    logits = model(batch.batch, NO_CACHE, model.fresh_media(pages)).float()
    losses = -logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    means = [float(part.mean()) for part in losses.split([sequence.num_targets for sequence in tokens])]
    correct = kinds.names.index(query.kind)
    return means.index(min(means)) == correct, means[correct]
