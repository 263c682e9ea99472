"""Beside the text's loss: visual tokens, and what the decoder's first layers hold of them, shall be alike where the
features' discriminants are, whatever the picture shows.

A bridge that has seen drawings alone keeps of a photograph what drawings have, and two photographs of a thing are then
no more alike than any two. Here it is held to the similarities among a batch's images, which need no labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import MediaCache
from model.flamingo import Flamingo
from training.batch import TrainingBatch
from training.bridge import BridgeLoss
from training.default.discriminants import Discriminants
from training.default.states import media_states

TEMPERATURE = 0.1
WEIGHT = 2.0


class TextAndSimilarityLoss(BridgeLoss):
    """For sets whose media are cached features; `prompt` shows one image (`one_image`)."""

    def __init__(self, flamingo: Flamingo, prompt: Sequence[int], discriminants: Discriminants) -> None:
        super().__init__(flamingo)
        self.prompt, self.discriminants = prompt, discriminants

    def forward(self, batch: TrainingBatch) -> Tensor:
        model = self.flamingo
        tokens = self.visual_tokens(batch.media)  # [M, R, D]
        media = model.fresh_media(tokens)
        states = media_states(model, media, self.prompt)
        return self.text(batch, media) + similarity_loss(batch, self.discriminants, tokens.mean(1), states)

    def text(self, batch: TrainingBatch, media: MediaCache) -> Tensor:
        logits = self.flamingo(batch.batch, None, media)
        return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


def similarity_loss(batch: TrainingBatch, discriminants: Discriminants, *seen: Tensor) -> Tensor:
    """Mean features' discriminants and each of `seen` [M, D] have the same neighbours; weighed as a loss of every
    target."""
    wanted = wanted_of(batch, discriminants)
    apart = torch.stack([disagreement(rows.float(), wanted) for rows in seen])
    return WEIGHT * batch.num_targets * apart.sum()


def wanted_of(batch: TrainingBatch, discriminants: Discriminants) -> Tensor:
    """[M, D]: the discriminants of each image's mean feature, whose similarities are those to be held to."""
    return discriminants(torch.stack([one.float().mean((0, 1)) for one in batch.media]))


def disagreement(seen: Tensor, wanted: Tensor) -> Tensor:
    """[M, D] each -> the mean divergence of each image's neighbours, as `seen` has them, from `wanted`'s."""
    target = neighbours(wanted)
    return (target.exp() * (target - neighbours(seen))).sum(-1).mean()


def neighbours(rows: Tensor) -> Tensor:
    """[M, D] -> [M, M - 1], log-probabilities of the other rows by their cosine."""
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    scores = cosines(rows)[others].view(len(rows), len(rows) - 1)
    return (scores / TEMPERATURE).log_softmax(-1)


def cosines(rows: Tensor) -> Tensor:
    """[M, D] -> [M, M], the rows' mean taken off all."""
    directions = F.normalize(rows - rows.mean(0), dim=-1)
    return directions @ directions.T
