"""How well a trained model names the kind of an unseen image behind four shots, among all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch

from model.batch import NO_CACHE
from model.flamingo import Flamingo
from model.tokenizer import PromptTokenizer
from training.ablations.data import Kinds, Query, asked
from training.batch import collate
from training.bridge import BridgeLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    accuracy: float  # share of queries whose own kind is the likeliest candidate
    loss: float  # of the own kind's tokens and the chunk's end, nats a token, mean over queries


def score(model: Flamingo, tokenizer: PromptTokenizer, kinds: Kinds, asked_for: Sequence[Query]) -> Score:
    results = [_judged(model, tokenizer, kinds, query) for query in asked_for]
    return Score(
        accuracy=sum(right for right, _ in results) / len(results), loss=sum(loss for _, loss in results) / len(results)
    )


@torch.inference_mode()
def _judged(model: Flamingo, tokenizer: PromptTokenizer, kinds: Kinds, query: Query) -> tuple[bool, float]:
    """Every candidate behind the same prompt, in one forward; a longer name has no more to lose: the mean counts."""
    prepared = [kinds.prepared(asked(query, name), tokenizer, Random(0)) for name in kinds.names]
    media = {digest: shown for one in prepared for digest, shown in one.media.items()}
    all_previous = model.config.gated.attends == "all_previous"
    device = model.language_model.embed.weight.device
    batch = collate([one.tokens for one in prepared], media, device, all_previous=all_previous)
    pages = BridgeLoss(model).visual_tokens(batch.media)
    logits = model(batch.batch, NO_CACHE, model.fresh_media(pages)).float()
    losses = -logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    means = [float(part.mean()) for part in losses.split([one.tokens.num_targets for one in prepared])]
    own = kinds.names.index(query.kind)
    return means.index(min(means)) == own, means[own]
