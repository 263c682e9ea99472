"""Vision encoders that timm builds: convolutional networks by timm's names.

`model.vision` imports this module only for a model that needs it, because timm loads torchvision and torch's compiler.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.efficientnet import EfficientNet
from torch import nn

from model.config import ConfigError
from model.efficientnet import fold_batch_norms


def convolutional(name: str) -> Any:
    """Build a network up to its last feature map. Raises `ConfigError` for a name that timm does not know."""
    if not timm.is_model(name):
        raise ConfigError(f"architecture {name!r} is not a model of timm")
    try:
        return timm.create_model(name, num_classes=0, global_pool="")
    except RuntimeError as error:  # the part of the name after a dot
        raise ConfigError(f"architecture {name!r} is not a model of timm: {error}") from None


def feature_map(name: str, image_size: int) -> tuple[int, int]:
    """Return the width and the number of a network's features of a square image; nothing is computed.

    Raises `ConfigError` for a network that timm does not know, that reads no images of this size, or whose features are not
    a channels-first map.
    """
    with torch.device("meta"):
        encoder = convolutional(name)
        try:
            features = encoder.eval().forward_features(torch.empty(1, 3, image_size, image_size))
        except (AssertionError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), "")
            raise ConfigError(
                f"architecture {name!r} cannot read images of image_size {image_size}: {reason}"
            ) from None
    if features.dim() != 4 or features.shape[1] != encoder.num_features:
        raise ConfigError(
            f"architecture {name!r} gives features of shape {tuple(features.shape)}, must be a channels-first map"
        )
    return encoder.num_features, features.shape[2] * features.shape[3]


def tensor_names(name: str) -> set[str]:
    """Return the names of all tensors of a network as published, with its classifier."""
    with torch.device("meta"):
        return set(timm.create_model(name).state_dict())


def fold(encoder: nn.Module) -> None:
    """Fold the batch norms of an EfficientNet; other networks may not run their parts in the order of definition."""
    if isinstance(encoder, EfficientNet):
        fold_batch_norms(encoder)
