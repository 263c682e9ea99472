"""The directions in which the training pictures of one thing agree and things differ (linear discriminants, Rao 1948).

Learned from features alone, in seconds, they tell held-out drawings apart better than the features do, and photographs
about as well. The resampler begins by reading them; what is held to similarities is held to theirs. Pictures are moved to
made-up domains in them, so that only likeness can be learned from, and a photograph is no stranger than what was seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ConfigError
from training.default.catalogue import Catalogue

# of the covariance within a thing, to one that is equal everywhere: else what no drawing varies in would be blown up
SHRINKAGE = 0.5
LENGTH = 6.0  # of a picture's mean feature
SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Discriminants:
    mean: Tensor  # [Dv]
    directions: Tensor  # [D, Dv]
    inverse: Tensor  # [Dv, D]

    def __call__(self, features: Tensor) -> Tensor:  # [.., Dv] -> [.., D]
        return (features - self.mean) @ self.directions.T

    def moved(self, features: Tensor, domain: Domain, seed: int) -> Tensor:
        """Features [.., Dv] of one picture as they would be in `domain`; what is no discriminant of them stays."""
        before = self(features)
        after = before @ domain.rotation.T + domain.noise * random_direction(len(domain.offset), seed)
        after = after * (LENGTH / math.hypot(LENGTH, domain.noise)) + domain.offset
        return features + (after - before) @ self.inverse.T


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """Where things differ in other directions, lie around another mean, and pictures of one thing are less alike: in
    length, a picture stays as it is."""

    rotation: Tensor  # [D, D]
    offset: Tensor  # [D]
    noise: float  # the length of what a picture has of its own


@lru_cache(maxsize=1)
def random_domain(dim: int, strangeness: float, noise: float, seed: int) -> Domain:
    """The mean at most `strangeness` times as long as a picture, the noise at most `noise` times. The last one is
    remembered: a step's pictures share theirs."""
    rng = Random(seed)
    offset = strangeness * LENGTH * rng.random() * random_direction(dim, rng.getrandbits(63))
    noise = noise * LENGTH * rng.random()
    return Domain(random_rotation(dim, rng.getrandbits(63)), offset, noise)


@cache
def fit_discriminants(data: Path, dim: int) -> Discriminants:
    """Of the labelled training pictures in `data` (`training.default_data`)."""
    catalogue = Catalogue(data)
    things = [torch.stack([catalogue.pooled(row) for row in rows]) for rows in catalogue.labels.values()]
    return discriminants(things, dim)


def discriminants(things: list[Tensor], dim: int) -> Discriminants:
    """`things`: the mean features [n, Dv] of each thing's pictures. The best `dim` directions, mixed."""
    if dim > (there := things[0].shape[1]):
        raise ConfigError(f"{dim} discriminants were asked for, of features of {there} numbers")
    pictures = torch.cat(things).double()
    centres = torch.stack([one.double().mean(0) for one in things])
    apart = pictures - torch.cat([c.expand(len(one), -1) for c, one in zip(centres, things, strict=True)])
    within = apart.T @ apart / len(pictures)  # [Dv, Dv]
    even = torch.eye(len(within), dtype=within.dtype) * within.trace() / len(within)
    lengths, axes = torch.linalg.eigh((1 - SHRINKAGE) * within + SHRINKAGE * even)
    whitening = axes * lengths.rsqrt()
    _, best = torch.linalg.eigh(whitening.T @ torch.cov(centres.T) @ whitening)
    found = (whitening @ best[:, -dim:]).T  # [D, Dv]
    mean = pictures.mean(0)
    found *= LENGTH / ((pictures - mean) @ found.T).norm(dim=-1).mean()
    # no coordinate is better than another: attention heads share them out by their place
    directions = random_rotation(dim, SEED).double() @ found
    return Discriminants(mean.float(), directions.float(), torch.linalg.pinv(directions).float())


def random_rotation(dim: int, seed: int) -> Tensor:  # [D, D]
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)))[0]


def random_direction(dim: int, seed: int) -> Tensor:  # [D], of length one
    return F.normalize(torch.randn(dim, generator=torch.Generator().manual_seed(seed)), dim=0)
