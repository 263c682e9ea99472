"""The similarity loss keeps visual tokens and early decoder states as similar as the features' discriminants are.

It is added to the text loss. A bridge that was trained only on drawings keeps only those features of a photograph in which
drawings vary; two photographs of a label are then no more similar than any two photographs. This loss preserves the
similarities among a batch's images, whatever they show, and needs no labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batch import TrainingBatch
from training.default.discriminants import Discriminants

TEMPERATURE = 0.1
WEIGHT = 2.0


def similarity_loss(batch: TrainingBatch, discriminants: Discriminants, *representations: Tensor) -> Tensor:
    """Return the divergence of each representation's [M, D] neighbours from those of the images' discriminants.

    The loss is scaled by the number of targets.
    """
    target = target_discriminants(batch, discriminants)
    divergences = torch.stack([neighbour_divergence(rows.float(), target) for rows in representations])
    return WEIGHT * batch.num_targets * divergences.sum()


def target_discriminants(batch: TrainingBatch, discriminants: Discriminants) -> Tensor:
    """Return the discriminants [M, D] of the images' mean features, whose similarities are the target."""
    return discriminants(torch.stack([features.float().mean((0, 1)) for features in batch.media]))


def neighbour_divergence(rows: Tensor, target: Tensor) -> Tensor:
    """Return the mean divergence of the rows' neighbours from the target's; both [M, D]."""
    target_log_probs = neighbour_log_probs(target)
    return (target_log_probs.exp() * (target_log_probs - neighbour_log_probs(rows))).sum(-1).mean()


def neighbour_log_probs(rows: Tensor) -> Tensor:
    """Return each row's log-probabilities [M, M - 1] over the other rows [M, D], by their cosines."""
    off_diagonal = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    scores = cosines(rows)[off_diagonal].view(len(rows), len(rows) - 1)
    return (scores / TEMPERATURE).log_softmax(-1)


def cosines(rows: Tensor) -> Tensor:
    """Return the cosines [M, M] between rows [M, D] after their mean is subtracted."""
    directions = F.normalize(rows - rows.mean(0), dim=-1)
    return directions @ directions.T
