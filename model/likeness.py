"""A model's likeness: maps each image to a vector of length one; the inner product of two vectors is their similarity.

It is computed from the mean features of the frozen vision encoder. A model may have its encoder's own classifier and linear
discriminants of its training images, as the default model does. Images are then similar if they have similar discriminants,
similar classes, and classes with the same ancestors in WordNet. Ancestors have more weight for images that differ from the
training images, such as photographs for a model of drawings. Other models compare features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from model.config import ConfigError

Vectors = NDArray[np.float32]

# the file in a model's folder
LIKENESS = "likeness.safetensors"
MATRICES = ("mean", "directions", "weight", "bias")
# tensors that older files lack: such a file has no familiar directions, and its shares are FIRST_SHARES
SHARES, FAMILIAR = "shares", "familiar"
FIRST_SHARES = (1.0, 0.35, 0.35, 0.35)
# slope between familiar and strange images, at the point where half of a deviation is familiar
SHARPNESS = 4


class Likeness(Protocol):
    def __call__(self, features: Vectors, /) -> Vectors:
        """Return vectors [N, D] of length one for mean features [N, Dv]."""


@dataclass(frozen=True, eq=False)
class ClassLikeness:
    """The likeness by discriminants, classes and their ancestors: the mean of three similarities, weighted by `shares`.

    The value of an ancestor is the square root of the probability of its classes, minus its value for equally probable
    classes. An image is strange to the degree that it differs from the training images' mean in unfamiliar directions.
    """

    mean: Vectors  # [Dv]
    directions: Vectors  # [D, Dv], of the discriminants
    weight: Vectors  # [C, Dv], of the classifier
    bias: Vectors  # [C]
    ancestors: Vectors  # [A, C]: 1 for the classes below a node of WordNet, else 0
    familiar: Vectors  # [K, Dv], orthonormal: the directions in which training images differ most
    shares: Vectors  # [4], of discriminants, classes, and ancestors of a familiar and of a strange image

    def __call__(self, features: Vectors) -> Vectors:
        discriminants = (features - self.mean) @ self.directions.T
        logits = features @ self.weight.T
        evidence = logits - logits.mean(-1, keepdims=True)
        probabilities = _softmax(logits + self.bias)
        nodes = np.sqrt(self._sums_below(probabilities)) - self._expected
        of_discriminants, of_classes, of_familiar, of_strange = self.shares
        of_ancestors = of_familiar + (of_strange - of_familiar) * self.strangeness(features)[:, None]
        parts = ((of_discriminants, discriminants), (of_classes, evidence), (of_ancestors, nodes))
        return unit(np.concatenate([np.sqrt(share) * unit(part) for share, part in parts], axis=-1))

    @cached_property
    def _expected(self) -> Vectors:  # [A], with all classes alike
        return np.sqrt(self.ancestors.mean(1))

    def _sums_below(self, probabilities: Vectors) -> Vectors:  # [N, C] -> [N, A]
        """Return the sums over the classes below each ancestor; a class has about ten ancestors of more than a thousand."""
        ancestors, classes = self._below
        sums = [np.bincount(ancestors, row[classes], len(self.ancestors)) for row in probabilities]
        return np.array(sums, np.float32).reshape(-1, len(self.ancestors))

    @cached_property
    def _below(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        ancestors, classes = np.nonzero(self.ancestors)
        return ancestors, classes

    def strangeness(self, features: Vectors) -> Vectors:
        """Return how strange each image is, [N], from 0 to 1."""
        deviation = unit(features - self.mean)
        inside = np.square(deviation @ self.familiar.T).sum(-1)
        outside = np.maximum(1 - inside, 0)
        strangeness: Vectors = outside**SHARPNESS / (outside**SHARPNESS + inside**SHARPNESS)
        return strangeness


def to_tensors(
    ancestors: NDArray[np.generic], shares: ArrayLike, **matrices: Vectors
) -> dict[str, NDArray[np.generic]]:
    """Return the tensors that `load_likeness` reads, or some of them; `matrices` are named as the attributes."""
    # safetensors writes an array in the order of its memory
    stored = {name: np.ascontiguousarray(matrix, np.float16) for name, matrix in matrices.items()}
    packed = np.packbits(np.ascontiguousarray(ancestors, bool), axis=1)
    return {**stored, "ancestors": packed, SHARES: np.array(shares, np.float32)}


def load_likeness(folder: Path, dim: int | None = None) -> Likeness:
    """Return the likeness of a model folder.

    Raises `ConfigError` for a file that is damaged or for features of another width than `dim`.
    """
    if not (folder / LIKENESS).is_file():
        return unit
    try:
        tensors = load_file(folder / LIKENESS)
        likeness = ClassLikeness(
            **{name: tensors[name].astype(np.float32) for name in MATRICES},
            ancestors=unpack_ancestors(tensors),
            familiar=tensors.get(FAMILIAR, tensors["directions"][:0]).astype(np.float32),
            shares=tensors.get(SHARES, np.array(FIRST_SHARES, np.float32)),
        )
        _check_shapes(likeness, len(likeness.mean) if dim is None else dim)
    except KeyError as error:
        raise ConfigError(f"{folder / LIKENESS} has no tensor {error}") from None
    except (SafetensorError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / LIKENESS} cannot be read as a likeness: {error}") from None
    return likeness


def _check_shapes(likeness: ClassLikeness, dim: int) -> None:
    """Raise `ConfigError` for a matrix that does not fit the others and features of width `dim`."""
    num_classes = len(likeness.bias)
    shapes = {
        "mean": (dim,),
        "directions": (len(likeness.directions), dim),
        "weight": (num_classes, dim),
        "bias": (num_classes,),
        FAMILIAR: (len(likeness.familiar), dim),
        SHARES: (len(FIRST_SHARES),),
    }
    for name, shape in shapes.items():
        if (actual := getattr(likeness, name).shape) != shape:
            raise ConfigError(f"{name} has shape {list(actual)}, expected {list(shape)}")


def unpack_ancestors(tensors: Mapping[str, NDArray[np.generic]]) -> Vectors:  # -> [A, C]
    packed = tensors["ancestors"].astype(np.uint8, copy=False)
    return np.unpackbits(packed, axis=1, count=len(tensors["bias"])).astype(np.float32)


def unit(vectors: NDArray[np.floating]) -> Vectors:
    """Scale vectors [.., D] to length one; a vector of zeros stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)


def _softmax(logits: Vectors) -> Vectors:
    exponents: Vectors = np.exp(logits - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)
