"""A model's likeness: a vector per image, of length one, whose inner products say how alike images are.

It is computed from the mean features of the frozen vision encoder. A model may come with its encoder's own classifier and
with linear discriminants of its training images (the default model does): images are then alike if they have the same
discriminants, the same classes, and classes with the same ancestors in WordNet. Other models compare features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Vectors = NDArray[np.float32]

# the file in a model's folder
LIKENESS = "likeness.safetensors"
# of the classes' similarity, relative to the discriminants'; between 0.5 and 1.5 the accuracy is the same
CLASS_WEIGHT = 0.7
MATRICES = ("mean", "directions", "weight", "bias")


class Likeness(Protocol):
    def __call__(self, features: Vectors, /) -> Vectors:
        """Return vectors [N, D] of length one for mean features [N, Dv]."""


@dataclass(frozen=True, slots=True, eq=False)
class ClassLikeness:
    """The likeness by discriminants, classes and their ancestors.

    An image has an ancestor with the square root of the probability of its classes, less that of all classes alike.
    """

    mean: Vectors  # [Dv]
    directions: Vectors  # [D, Dv], of the discriminants
    weight: Vectors  # [C, Dv], of the classifier
    bias: Vectors  # [C]
    ancestors: Vectors  # [A, C]: 1 for the classes below a node of WordNet, else 0

    def __call__(self, features: Vectors) -> Vectors:
        discriminants = (features - self.mean) @ self.directions.T
        evidence = unit(features) @ (self.weight - self.weight.mean(0)).T
        probabilities = _softmax(features @ self.weight.T + self.bias)
        nodes = np.sqrt(probabilities @ self.ancestors.T) - np.sqrt(self.ancestors.mean(1))
        classes = unit(np.concatenate([unit(evidence), unit(nodes)], axis=-1))
        return unit(np.concatenate([unit(discriminants), np.float32(CLASS_WEIGHT**0.5) * classes], axis=-1))


def to_tensors(ancestors: NDArray[np.generic], **matrices: Vectors) -> dict[str, NDArray[np.generic]]:
    """Return the tensors that `load_likeness` reads, or some of them: `matrices` are those of `MATRICES`."""
    # safetensors writes an array as it lies in memory
    stored = {name: np.ascontiguousarray(matrix, np.float16) for name, matrix in matrices.items()}
    return {**stored, "ancestors": np.packbits(np.ascontiguousarray(ancestors, bool), axis=1)}


def load_likeness(folder: Path) -> Likeness:
    """Return the likeness of a model folder."""
    if not (folder / LIKENESS).is_file():
        return unit
    tensors = load_file(folder / LIKENESS)
    num_classes = len(tensors["bias"])
    return ClassLikeness(
        **{name: tensors[name].astype(np.float32) for name in MATRICES},
        ancestors=np.unpackbits(tensors["ancestors"], axis=1, count=num_classes).astype(np.float32),
    )


def unit(vectors: NDArray[np.floating]) -> Vectors:
    """Scale vectors [.., D] to length one; a vector of zeros stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)


def _softmax(logits: Vectors) -> Vectors:
    exponents: Vectors = np.exp(logits - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)
