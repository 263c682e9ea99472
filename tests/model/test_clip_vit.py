"""The Vision Transformer of CLIP: bit for bit timm's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model.clip_vit import ClipVit
from model.config import Activation, VisionConfig
from model.layers import ACTIVATIONS
from tests.vision_configs import TINY_CLIP


class Activated(nn.Module):
    """One of `ACTIVATIONS` as a module, as timm expects it."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.function: Callable[[Tensor], Tensor] = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def timm_vit(config: VisionConfig) -> VisionTransformer:
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.feature_dim,
        depth=config.num_layers,
        num_heads=config.num_heads,
        # 0.5 more, so that timm's int(dim * ratio) cannot be less than ffn_dim
        mlp_ratio=(config.ffn_dim + 0.5) / config.feature_dim,
        act_layer=partial(Activated, config.activation),
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        pre_norm=True,
        final_norm=False,
        num_classes=0,
        global_pool="",
    )


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("image_size", [28, 33])
@torch.inference_mode()
def test_the_features_are_those_of_timm(activation: Activation, image_size: int) -> None:
    config = replace(TINY_CLIP, activation=activation, image_size=image_size)
    torch.manual_seed(0)
    ours, theirs = ClipVit(config).eval(), timm_vit(config).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3)
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 3, image_size, image_size)
    features = ours.forward_features(pixels)
    assert features.std() > 0.1
    assert torch.equal(features, theirs.forward_features(pixels))


def test_an_encoder_begins_with_the_weights_that_timm_draws() -> None:
    torch.manual_seed(0)
    theirs = timm_vit(TINY_CLIP).state_dict()
    torch.manual_seed(0)
    ours = ClipVit(TINY_CLIP).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
