"""The resamplers that the paper compares with the Perceiver (Flamingo, table 3): a plain transformer and an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ResamplerConfig
from model.layers import LayerNorm
from model.resampler import PerceiverResampler, Resampler, ResamplerFeedForward


class TransformerLayer(nn.Module):
    """Features and latents [M, N + R, D] attend to each other, all to all."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        self.norm = LayerNorm(config.dim, config.norm_eps)
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.output = nn.Linear(inner, config.dim, bias=False)
        self.feed_forward = ResamplerFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, -1, self.head_dim))  # [M, N + R, 3, H, K]
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)  # [M, H, N + R, K]
        x = x + self.output(attended.transpose(1, 2).flatten(-2))
        return x + self.feed_forward(x)


class TransformerResampler(Resampler):
    layer_type = TransformerLayer

    def forward(self, features: Tensor) -> Tensor:
        features = self.embed(features)  # [M, N, D]
        x = torch.cat([features, self.latents.expand(len(features), -1, -1)], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x[:, -self.num_latents :])


class MLPResampler(Resampler):
    """No attention: each latent takes the mean of its own stretch of adjacent features, and reads no other."""

    layer_type = ResamplerFeedForward

    def forward(self, features: Tensor) -> Tensor:
        means = F.adaptive_avg_pool1d(self.embed(features).transpose(1, 2), self.num_latents)  # [M, D, R]
        x = self.latents + means.transpose(1, 2)
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


RESAMPLERS: dict[str, type[Resampler]] = {
    "perceiver": PerceiverResampler,
    "transformer": TransformerResampler,
    "mlp": MLPResampler,
}


def build_resampler(config: ResamplerConfig, feature_dim: int) -> Resampler:
    return RESAMPLERS[config.kind](config, feature_dim)
