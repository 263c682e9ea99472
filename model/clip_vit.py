"""The Vision Transformer of CLIP up to its last hidden state, with the names of timm's tensors.

timm has the same network, but `import timm` loads torchvision and torch's compiler, which doubles a worker's imports.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Activation, VisionConfig
from model.layers import ACTIVATIONS

INITIAL_STD = 0.02


class ClipVit(nn.Module):
    """CLIP's network without the final norm and the projection, which only CLIP's own pooling uses."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dim, norm_eps = config.feature_dim, config.norm_eps
        num_patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbedding(dim, config.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, dim))
        self.norm_pre = nn.LayerNorm(dim, norm_eps)
        self.blocks = nn.Sequential(
            *(
                Block(dim, config.num_heads, config.ffn_dim, config.activation, norm_eps)
                for _ in range(config.num_layers)
            )
        )
        if not self.cls_token.is_meta:  # drawing there would import torch's compiler, which takes a second
            self._draw_weights()

    def _draw_weights(self) -> None:
        """Draw the initial values of an encoder that is trained from the beginning: timm's, for the same seed."""
        _draw_normal(self.pos_embed)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _draw_normal(module.weight)
                nn.init.zeros_(module.bias)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [F, 3, h, w] -> features [F, 1 + P, Dv]: the class token's, then those of the patches."""
        patches = self.patch_embed(pixels)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1) + self.pos_embed
        features: Tensor = self.blocks(self.norm_pre(x))
        return features


@torch.no_grad()
def _draw_normal(values: Tensor) -> None:
    """Draw from a normal distribution by the inverse of its distribution function."""
    values.uniform_(-1, 1).erfinv_().mul_(INITIAL_STD * math.sqrt(2)).clamp_(-2, 2)


class PatchEmbedding(nn.Module):
    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:  # [F, 3, h, w] -> [F, P, Dv]
        embedded: Tensor = self.proj(pixels)
        return embedded.flatten(2).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, ffn_dim: int, activation: Activation, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, ffn_dim, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [F, N, Dv] -> [F, N, Dv]
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind())  # [F, heads, N, head dim]
        result: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return result


class Mlp(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, activation: Activation) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.activation(self.fc1(x)))
        return result
