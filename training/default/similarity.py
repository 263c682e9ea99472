"""Beside the text's loss: visual tokens, and what the decoder's first layers hold of them, shall be alike where the
features' discriminants are, whatever the picture shows.

A bridge that has seen drawings alone keeps of a photograph what drawings have, and two photographs of a thing are then
no more alike than any two. Here it is held to the similarities among a batch's images, which need no labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batch import TrainingBatch
from training.default.discriminants import Discriminants

TEMPERATURE = 0.1
WEIGHT = 2.0


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
