"""The directions in which the pictures of one thing agree and things differ (linear discriminants, Rao 1948).

Fitted to features alone, in seconds. In what pictures of a thing agree is said by the training drawings; in what things
differ, by them and by the classes of the frozen encoder's own classifier, or what tells photographs apart and no drawings
would be lost. There are few, not many more than a head of the frozen decoder is wide: of many, what reaches the comparing
would be a random projection. The resampler begins by reading them; what is held to similarities is held to theirs. Pictures
are moved to made-up domains in them, so that only likeness can be learned from, and a photograph is no stranger than what
was seen.
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
from training.default_data.classes import read_classes

# of the covariance within a thing, to one that is equal everywhere: else what no drawing varies in would be blown up
SHRINKAGE = 0.5
CLASSES = 3.0  # the encoder's classes' share in how things differ, beside the drawings'
NARROWER = 4  # times: than a visual token is
LENGTH = 6.0  # of a picture's mean feature
SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Discriminants:
    mean: Tensor  # [Dv]
    directions: Tensor  # [D, Dv]
    inverse: Tensor  # [Dv, D]

    def __call__(self, features: Tensor) -> Tensor:  # [.., Dv] -> [.., D]
        return (features - self.mean) @ self.directions.T

    def spread(self, width: int) -> Tensor:
        """[width, Dv]: the directions in `width` coordinates, all distances kept. None of these is better than another:
        attention heads share them out by their place."""
        return random_rotation(width, SEED)[:, : len(self.directions)] @ self.directions

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
def fit_discriminants(data: Path, width: int) -> Discriminants:
    """Of the labelled training pictures in `data` (`training.default_data`), for visual tokens of `width` numbers."""
    catalogue = Catalogue(data)
    things = [torch.stack([catalogue.pooled(row) for row in rows]) for rows in catalogue.labels.values()]
    return discriminants(things, read_classes(data), width // NARROWER)


def discriminants(things: list[Tensor], classes: Tensor, dim: int) -> Discriminants:
    """The best `dim` directions. `things`: the mean features [n, Dv] of each thing's pictures; `classes` [C, Dv]: the
    weights of a classifier that reads such features."""
    if dim > (there := things[0].shape[1]):
        raise ConfigError(f"{dim} discriminants were asked for, of features of {there} numbers")
    pictures = torch.cat(things).double()
    centres = torch.stack([one.double().mean(0) for one in things])
    apart = pictures - torch.cat([c.expand(len(one), -1) for c, one in zip(centres, things, strict=True)])
    within = apart.T @ apart / len(pictures)  # [Dv, Dv]
    even = torch.eye(len(within), dtype=within.dtype) * within.trace() / len(within)
    within = (1 - SHRINKAGE) * within + SHRINKAGE * even
    # where pictures of a class spread like this, the best classifier's weights are its mean through `within`'s inverse
    between = of_unit_trace(centres) + CLASSES * of_unit_trace(classes.double() @ within)
    lengths, axes = torch.linalg.eigh(within)
    whitening = axes * lengths.rsqrt()
    _, best = torch.linalg.eigh(whitening.T @ between @ whitening)
    found = (whitening @ best[:, -dim:]).T  # [D, Dv]
    mean = pictures.mean(0)
    found *= LENGTH / ((pictures - mean) @ found.T).norm(dim=-1).mean()
    return Discriminants(mean.float(), found.float(), torch.linalg.pinv(found).float())


def of_unit_trace(rows: Tensor) -> Tensor:  # [n, Dv] -> their covariance [Dv, Dv]
    covariance = torch.cov(rows.T)
    return covariance / covariance.trace()


def random_rotation(dim: int, seed: int) -> Tensor:  # [D, D]
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)))[0]


def random_direction(dim: int, seed: int) -> Tensor:  # [D], of length one
    return F.normalize(torch.randn(dim, generator=torch.Generator().manual_seed(seed)), dim=0)
