"""The frozen vision encoder: normalised pixels [F, 3, h, w] -> features [F, P, Dv], which the resampler reads.

A CLIP Vision Transformer returns its last hidden state, before the final norm that only CLIP's own pooling uses. A
convolutional network returns its last feature map, a token per position. Parts after the features are not built.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from timm.models.efficientnet import EfficientNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from model.config import Activation, ConfigError, VisionConfig
from model.layers import ACTIVATIONS


def normalise(frames: Tensor, config: VisionConfig) -> Tensor:
    """Normalise each channel by the encoder's mean and deviation: uint8 [F, h, w, 3] -> float32 [F, 3, h, w]."""
    mean, std = (torch.tensor(channels, device=frames.device) for channels in (config.mean, config.std))
    return ((frames.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = clip_vit(config) if config.architecture == "clip_vit" else convolutional(config)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(next(self.encoder.parameters()).dtype)
        return self._hidden_state(pixels) if self.config.architecture == "clip_vit" else self._map(pixels)

    def _hidden_state(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.encoder.forward_features(pixels)
        return features if self.config.keep_class_token else features[:, 1:]

    def _map(self, pixels: Tensor) -> Tensor:
        # several times faster on a CPU than the planar layout
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.encoder.forward_features(pixels)  # [F, Dv, h, w]
        return features.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def fold_batch_norms(self) -> None:
        """Fold each batch norm of an EfficientNet into the convolution before it, in float32, for inference.

        Its activation stays. Other networks stay as they are: the order of their parts may not be that of the forward.
        """
        if not isinstance(self.encoder, EfficientNet):
            return
        for parent in list(self.encoder.modules()):
            for (_, convolution), (name, norm) in pairwise(list(parent.named_children())):
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                    _fold_norm(convolution, norm)
                    setattr(parent, name, norm.act)

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stay in evaluation mode: training the whole model must not change the frozen encoder's batch statistics."""
        return super().train(False)


def _fold_norm(convolution: nn.Conv2d, norm: BatchNormAct2d) -> None:
    bias = None if convolution.bias is None else convolution.bias.float()
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, scale, shift = (x.float() for x in tensors if x is not None)
    folded = fuse_conv_bn_weights(convolution.weight.float(), bias, mean, variance, norm.eps, scale, shift)
    dtype = convolution.weight.dtype
    convolution.weight, convolution.bias = (nn.Parameter(x.to(dtype), requires_grad=False) for x in folded)


class Activated(nn.Module):
    """One of `ACTIVATIONS` as a module, as timm expects it."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.function: Callable[[Tensor], Tensor] = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def clip_vit(config: VisionConfig) -> Any:
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.feature_dim,
        depth=config.num_layers,
        num_heads=config.num_heads,
        # half a unit more, so that timm's int(dim * ratio) cannot round below ffn_dim
        mlp_ratio=(config.ffn_dim + 0.5) / config.feature_dim,
        act_layer=partial(Activated, config.activation),
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        pre_norm=True,
        final_norm=False,
        num_classes=0,
        global_pool="",
    )


def convolutional(config: VisionConfig) -> Any:
    name = config.architecture
    if not timm.is_model(name):
        raise ConfigError(f"vision.architecture {name!r} is neither 'clip_vit' nor a timm model")
    encoder: Any = timm.create_model(name, num_classes=0, global_pool="")
    side = -(-config.image_size // encoder.feature_info[-1]["reduction"])
    actual, configured = (side * side, encoder.num_features), (config.num_patches, config.feature_dim)
    if actual != configured:
        raise ConfigError(
            f"{name} has {actual} features (patches, width), vision.num_patches and feature_dim are {configured}"
        )
    return encoder
