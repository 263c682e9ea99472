"""The encoder's names: timm's model takes every tensor, and none is left over."""

from __future__ import annotations

import timm
import torch

from model.zoo.config import VISION_FILE
from model.zoo.default import find
from model.zoo.efficientnet_lite import to_timm


def test_timm_takes_every_tensor() -> None:
    tensors = to_timm(torch.load(find(VISION_FILE), weights_only=True))
    encoder = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in encoder.state_dict().items()
    }
