"""Linear discriminants (Rao 1948): the feature directions in which labels differ most relative to a label's images.

They are fitted to features alone, in seconds. The covariance within labels is that of the training drawings. The covariance
between labels is the sum of that of the drawings and that of the classes of the frozen encoder's own classifier: without
the classes, directions that distinguish photographs but not drawings would be lost. The number of directions is not much
larger than the width of a head of the frozen decoder, because a head sees only a random projection of more directions.

If the model appends the kin of a frame to its features (`model/kin.py`), the coordinates of kin are discriminants, too.

Discriminants initialise the resampler's input projection, and similarity losses compare images by them. Images are moved to
generated domains along them. So a model can learn only from similarity, and a photograph is no more unusual than a training
image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ConfigError
from model.kin import Kin
from training.default.catalogue import Catalogue
from training.default_data.classes import read_classes

# shrinkage of the covariance within labels; without it, directions in which no drawing varies would become large
SHRINKAGE = 0.5
CLASS_WEIGHT = (
    3.0  # weight of the covariance between the encoder's classes, relative to that between the drawings' labels
)
WIDTH_RATIO = 4  # the width of a visual token, divided by the number of directions
LENGTH = 6.0  # the mean length of an image's discriminants
# relative to LENGTH: the mean length of the kin of the training drawings; the kin of a photograph is twice as long
KIN_LENGTH = 0.3
SEED = 0
NUM_FAMILIAR = 64  # the directions in which training images differ; half a photograph's deviation is in others


@dataclass(frozen=True, slots=True, eq=False)
class Discriminants:
    """A linear map from features [.., Dv] to discriminants [.., D], and its pseudo-inverse."""

    mean: Tensor  # [Dv], also of kin
    directions: Tensor  # [D, Dv]
    inverse: Tensor  # [Dv, D]

    def __call__(self, features: Tensor) -> Tensor:  # [.., Dv] -> [.., D]
        return (features - self.mean) @ self.directions.T

    def projection(self, width: int) -> Tensor:
        """Return a matrix [width, Dv] that maps features to `width` coordinates and keeps the discriminants' distances.

        A random rotation makes all coordinates equally good, since attention heads divide them by index.
        """
        return random_rotation(width, SEED)[:, : len(self.directions)] @ self.directions

    def move_to_domain(self, features: Tensor, domain: Domain, seed: int) -> Tensor:
        """Return one image's features [.., Dv] as they would be in `domain`; their other components are unchanged."""
        before = self(features)
        after = before @ domain.rotation.T + domain.noise * random_direction(len(domain.offset), seed)
        after = after * (LENGTH / math.hypot(LENGTH, domain.noise)) + domain.offset
        return features + (after - before) @ self.inverse.T


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """A generated domain: labels differ in other directions, around another mean, and a label's images are less similar.

    The images keep their length.
    """

    rotation: Tensor  # [D, D]
    offset: Tensor  # [D]
    noise: float  # the length of the vector that is added to each image


@dataclass(frozen=True, slots=True, eq=False)
class Domains:
    """Another random domain for every step; `with_kin` completes features by their kin (`model/vision.py`)."""

    discriminants: Discriminants
    with_kin: Callable[[Tensor], Tensor]
    strangeness: float = 0.0
    noise: float = 0.0

    def move(self, features: Tensor, seed: int, step: int, row: int) -> Tensor:
        """Return the features of the image `row` with kin, as they would be in the domain of `step`."""
        domain_seed = Random(f"{seed}/domain/{step}").getrandbits(63)
        domain = random_domain(len(self.discriminants.directions), self.strangeness, self.noise, domain_seed)
        noise_seed = Random(f"{seed}/noise/{step}/{row}").getrandbits(63)
        return self.discriminants.move_to_domain(self.with_kin(features.float()), domain, noise_seed)


@lru_cache(maxsize=1)
def random_domain(dim: int, strangeness: float, noise: float, seed: int) -> Domain:
    """Draw a domain; the lengths of its mean and its noise are at most `strangeness` and `noise` times an image's length.

    The last domain is cached, because all images of a step share it.
    """
    rng = Random(seed)
    offset = strangeness * LENGTH * rng.random() * random_direction(dim, rng.getrandbits(63))
    noise = noise * LENGTH * rng.random()
    return Domain(random_rotation(dim, rng.getrandbits(63)), offset, noise)


@cache
def fit_discriminants(data: Path, width: int, kin: Kin | None = None) -> Discriminants:
    """Fit the discriminants of the labelled training images in `data`, for visual tokens of `width` numbers."""
    catalogue = Catalogue(data)
    images = [torch.stack([catalogue.pooled(row) for row in rows]) for rows in catalogue.labels.values()]
    discriminants = compute_discriminants(images, read_classes(data), width // WIDTH_RATIO)
    return discriminants if kin is None else with_kin(discriminants, kin.coordinates(torch.cat(images)))


def with_kin(discriminants: Discriminants, kin: Tensor) -> Discriminants:
    """Return the discriminants of features to which kin is appended; `kin` [n, K] is that of the training images."""
    mean = kin.mean(0)
    scale = float(KIN_LENGTH * LENGTH / (kin - mean).norm(dim=-1).mean())
    identity = torch.eye(len(mean))
    return Discriminants(
        torch.cat([discriminants.mean, mean]),
        torch.block_diag(discriminants.directions, identity * scale),
        torch.block_diag(discriminants.inverse, identity / scale),
    )


def compute_discriminants(images_by_label: list[Tensor], classes: Tensor, dim: int) -> Discriminants:
    """Return the best `dim` directions.

    `images_by_label` holds the mean features [n, Dv] of each label's images, `classes` [C, Dv] the weights of a classifier
    that reads such features. Raises ConfigError if `dim` exceeds the features' width, and for fewer than two
    labels, which have no covariance.
    """
    if len(images_by_label) < 2:
        raise ConfigError(f"discriminants need images of two labels or more to train on, not of {len(images_by_label)}")
    if dim > (width := images_by_label[0].shape[1]):
        raise ConfigError(f"{dim} discriminants were requested, but features of width {width} have at most {width}")
    images = torch.cat(images_by_label).double()
    centres = torch.stack([label.double().mean(0) for label in images_by_label])
    within = covariance_within(images_by_label)
    # if a class's images have this covariance, the best classifier's weights are its mean times the inverse of `within`
    between = unit_trace_covariance(centres) + CLASS_WEIGHT * unit_trace_covariance(classes.double() @ within)
    eigenvalues, axes = torch.linalg.eigh(within)
    whitening = axes * eigenvalues.rsqrt()
    _, eigenvectors = torch.linalg.eigh(whitening.T @ between @ whitening)
    directions = (whitening @ eigenvectors[:, -dim:]).T  # [D, Dv]
    mean = images.mean(0)
    directions *= LENGTH / ((images - mean) @ directions.T).norm(dim=-1).mean()
    return Discriminants(mean.float(), directions.float(), torch.linalg.pinv(directions).float())


def covariance_within(images_by_label: list[Tensor]) -> Tensor:
    """Return the covariance [Dv, Dv] of images around the mean of their label, shrunk towards an isotropic one."""
    deviations = torch.cat([images.double() - images.double().mean(0) for images in images_by_label])
    within = deviations.T @ deviations / len(deviations)
    isotropic = torch.eye(len(within), dtype=within.dtype) * within.trace() / len(within)
    return (1 - SHRINKAGE) * within + SHRINKAGE * isotropic


def familiar_directions(images: Tensor, mean: Tensor, count: int) -> Tensor:
    """Return the orthonormal directions [count, Dv] in which images [n, Dv] differ most from a mean [Dv]."""
    deviations = (images - mean).double()
    _, axes = torch.linalg.eigh(deviations.T @ deviations)  # the eigenvalues ascend
    return axes.T.flip(0)[:count].float()


def unit_trace_covariance(rows: Tensor) -> Tensor:  # [n, Dv] -> their covariance [Dv, Dv]
    covariance = torch.cov(rows.T)
    return covariance / covariance.trace()


def random_rotation(dim: int, seed: int) -> Tensor:  # [D, D]
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)))[0]


def random_direction(dim: int, seed: int) -> Tensor:  # [D], of length one
    return F.normalize(torch.randn(dim, generator=torch.Generator().manual_seed(seed)), dim=0)
