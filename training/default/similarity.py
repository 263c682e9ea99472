"""Beside the text's loss: visual tokens shall be alike where the encoder's features are, whatever the picture shows.

A resampler that has seen drawings alone keeps of a photograph what drawings have, and two photographs of a thing are then
no more alike than any two. Here it is held to the similarities among a batch's images, which need no labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batch import TrainingBatch
from training.bridge import BridgeLoss

TEMPERATURE = 0.1
WEIGHT = 2.0


class TextAndSimilarityLoss(BridgeLoss):
    """For sets whose media are cached features."""

    def forward(self, batch: TrainingBatch) -> Tensor:
        model = self.flamingo
        tokens = self.visual_tokens(batch.media)  # [M, R, D]
        logits = model(batch.batch, None, model.fresh_media(tokens))
        return F.cross_entropy(logits.float(), batch.targets, reduction="sum") + similarity_loss(batch, tokens)


def similarity_loss(batch: TrainingBatch, tokens: Tensor) -> Tensor:
    """Mean features and mean visual tokens have the same neighbours; weighed as one loss a target."""
    means = torch.stack([one.float().mean((0, 1)) for one in batch.media])  # [M, Dv]
    return WEIGHT * batch.num_targets * disagreement(tokens.float().mean(1), means)


def disagreement(seen: Tensor, wanted: Tensor) -> Tensor:
    """[M, D] and [M, Dv] -> the mean divergence of each image's neighbours, as `seen` has them, from `wanted`'s."""
    target = neighbours(wanted)
    return (target.exp() * (target - neighbours(seen))).sum(-1).mean()


def neighbours(rows: Tensor) -> Tensor:
    """[M, D] -> [M, M - 1], log-probabilities of the other rows by their cosine, the mean taken off all."""
    directions = F.normalize(rows - rows.mean(0), dim=-1)
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    scores = (directions @ directions.T)[others].view(len(rows), len(rows) - 1)
    return (scores / TEMPERATURE).log_softmax(-1)
