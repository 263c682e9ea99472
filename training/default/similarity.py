"""Beside the text's loss: visual tokens, and what the decoder's first layers hold of them, shall be alike where the
encoder's features are, whatever the picture shows.

A bridge that has seen drawings alone keeps of a photograph what drawings have, and two photographs of a thing are then
no more alike than any two. Here it is held to the similarities among a batch's images, which need no labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.flamingo import Flamingo
from training.batch import TrainingBatch
from training.bridge import BridgeLoss
from training.default.states import media_states

TEMPERATURE = 0.1
WEIGHT = 2.0


class TextAndSimilarityLoss(BridgeLoss):
    """For sets whose media are cached features; `prompt` shows one image (`one_image`)."""

    def __init__(self, flamingo: Flamingo, prompt: Sequence[int]) -> None:
        super().__init__(flamingo)
        self.prompt = prompt

    def forward(self, batch: TrainingBatch) -> Tensor:
        model = self.flamingo
        tokens = self.visual_tokens(batch.media)  # [M, R, D]
        media = model.fresh_media(tokens)
        text = F.cross_entropy(model(batch.batch, None, media).float(), batch.targets, reduction="sum")
        return text + similarity_loss(batch, tokens.mean(1), media_states(model, media, self.prompt))


def similarity_loss(batch: TrainingBatch, *seen: Tensor) -> Tensor:
    """Mean features and each of `seen` [M, D] have the same neighbours; weighed as a loss of every target."""
    means = torch.stack([one.float().mean((0, 1)) for one in batch.media])  # [M, Dv]
    apart = torch.stack([disagreement(rows.float(), means) for rows in seen])
    return WEIGHT * batch.num_targets * apart.sum()


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
