"""The kin of a frame: the ancestors, in WordNet, of the classes that the encoder's own classifier finds in it.

The value of an ancestor is the square root of the probability of the classes below it. A projection to a few fixed
directions, in which classes differ most, reduces the ancestors to coordinates, which are appended to each feature of the
frame. The more confident the classifier is, the longer they are, so kin has more weight for photographs than for drawings.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.config import KinConfig
from model.likeness import unpack_ancestors

PREFIX = "vision.kin."
ANCESTORS = f"{PREFIX}ancestors"
# eigenvectors have arbitrary signs, so a bridge works only with the directions on which it was trained
COMPONENTS = f"{PREFIX}components"


class Kin(nn.Module):
    """Appends the kin of each frame to its features: [.., P, Dv] -> [.., P, Dv + K]; it is never trained."""

    weight: Tensor
    bias: Tensor
    ancestors: Tensor
    components: Tensor

    def __init__(self, config: KinConfig, feature_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(config.num_classes, feature_dim))
        self.register_buffer("bias", torch.zeros(config.num_classes))
        self.register_buffer("ancestors", torch.zeros(config.num_ancestors, config.num_classes))
        self.register_buffer("components", torch.zeros(config.dim, config.num_ancestors))

    def forward(self, features: Tensor) -> Tensor:
        kin = self.coordinates(features.float().mean(-2)).to(features.dtype)
        return torch.cat([features, kin[..., None, :].expand(*features.shape[:-1], -1)], dim=-1)

    @torch.no_grad()
    def coordinates(self, means: Tensor) -> Tensor:
        """Return the kin [.., K] of frames by the means [.., Dv] of their features, in float32."""
        probabilities = F.linear(means.float(), self.weight.float(), self.bias.float()).softmax(-1)
        ancestors = F.linear(probabilities, self.ancestors.float()).sqrt()
        return F.linear(ancestors, self.components.float())


def classifier_tensors(likeness: Mapping[str, NDArray[np.generic]]) -> dict[str, Tensor]:
    """Return the tensors of kin, except its directions, under their full names, from a model folder's likeness."""
    matrices = {name: torch.from_numpy(likeness[name].astype(np.float32)) for name in ("weight", "bias")}
    tensors = {f"{PREFIX}{name}": matrix for name, matrix in matrices.items()}
    return {**tensors, ANCESTORS: torch.from_numpy(unpack_ancestors(likeness))}


def principal_components(ancestors: Tensor, dim: int) -> Tensor:
    """Return the orthonormal directions [dim, A] in which the ancestors [A, C] of the classes differ most."""
    deviations = (ancestors - ancestors.mean(1, keepdim=True)).double()
    _, axes = torch.linalg.eigh(deviations @ deviations.T)  # the eigenvalues ascend
    return axes.T.flip(0)[:dim].float().contiguous()
