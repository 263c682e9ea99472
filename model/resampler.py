"""The Perceiver resampler: any number of features becomes R visual tokens (Flamingo, section 3.1 and appendix A.1.1).

Learned latents attend to [features; latents], layer by layer. Frames carry a learned embedding of their time, linearly
interpolated when a video has more frames than were trained; an image is a video of one frame. A plain transformer and an
MLP may take the Perceiver's place: they are the paper's ablation (table 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.resampler_attention import resampler_attention
from model.config import ResamplerConfig
from model.layers import FeedForward, LayerNorm


class ResamplerAttention(nn.Module):
    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        self.media_norm = LayerNorm(config.dim, config.norm_eps)
        self.latent_norm = LayerNorm(config.dim, config.norm_eps)
        self.query = nn.Linear(config.dim, inner, bias=False)
        self.key_value = nn.Linear(config.dim, 2 * inner, bias=False)
        self.output = nn.Linear(inner, config.dim, bias=False)
        self.query_norm = LayerNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = LayerNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:  # [M, R, D], [M, N, D] -> [M, R, D]
        latents = self.latent_norm(latents)
        query = self.query_norm(self.heads(self.query(latents)))
        feature_key, feature_value = self.keys_and_values(self.media_norm(features))
        latent_key, latent_value = self.keys_and_values(latents)
        attended = resampler_attention(
            query, feature_key, feature_value, latent_key, latent_value, scale=self.head_dim**-0.5
        )
        return self.output(attended.flatten(-2))

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.key_value(x).chunk(2, dim=-1)
        return self.key_norm(self.heads(key)), self.heads(value)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class ResamplerLayer(nn.Module):
    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.attention = ResamplerAttention(config)
        self.feed_forward = ResamplerFeedForward(config)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        latents = latents + self.attention(latents, features)
        return latents + self.feed_forward(latents)


class ResamplerFeedForward(FeedForward):
    """A feed-forward with its norm inside."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__(config.dim, config.ffn_dim, config.activation)
        self.norm = LayerNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class TransformerLayer(nn.Module):
    """The ablation's layer: features and latents [M, N + R, D] attend to each other, all to all."""

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


LAYERS: dict[str, type[nn.Module]] = {
    "perceiver": ResamplerLayer,
    "transformer": TransformerLayer,
    "mlp": ResamplerFeedForward,
}


class PerceiverResampler(nn.Module):
    """Features [M, F, P, Dv] -> visual tokens [M, R, D]; F and P are free, R is `num_latents`. Whatever its kind."""

    def __init__(self, config: ResamplerConfig, feature_dim: int) -> None:
        super().__init__()
        self.input_norm = LayerNorm(feature_dim, config.norm_eps) if config.input_norm else nn.Identity()
        self.input = nn.Linear(feature_dim, config.dim) if config.input_projection else nn.Identity()
        self.spatial_embeddings = _table(config.num_spatial, config.dim)
        self.frame_embeddings = _table(config.num_frames, config.dim)
        self.kind, self.num_latents = config.kind, config.num_latents
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.dim).normal_(std=0.02))
        self.layers = nn.ModuleList(LAYERS[config.kind](config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.dim, config.norm_eps)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self._resampled(self.placed(features)))

    def _resampled(self, features: Tensor) -> Tensor:  # [M, N, D] -> [M, R, D]
        latents = self.latents.expand(features.shape[0], -1, -1)
        if self.kind == "mlp":
            return self._averaged(features, latents)
        if self.kind == "transformer":
            return self._attended(features, latents)
        for layer in self.layers:
            latents = layer(latents, features)
        return latents

    def _attended(self, features: Tensor, latents: Tensor) -> Tensor:
        x = torch.cat([features, latents], dim=1)
        for layer in self.layers:
            x = layer(x)
        return x[:, -self.num_latents :]

    def _averaged(self, features: Tensor, latents: Tensor) -> Tensor:
        """The MLP: each latent takes the mean of its own stretch of neighbouring features, and sees no other."""
        x = latents + F.adaptive_avg_pool1d(features.transpose(1, 2), self.num_latents).transpose(1, 2)
        for layer in self.layers:
            x = x + layer(x)
        return x

    def placed(self, features: Tensor) -> Tensor:
        """Features [M, F, P, Dv] as the layers read them, with their place in the picture and in time: [M, F * P, D]."""
        features = self.input(self.input_norm(features))
        if self.spatial_embeddings is not None:
            features = features + self.spatial_embeddings
        if self.frame_embeddings is not None:
            times = interpolate_frames(self.frame_embeddings, features.shape[1])  # [F, D]
            features = features + times[:, None]
        return features.flatten(1, 2)


def _table(rows: int, dim: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(rows, dim).normal_(std=0.02)) if rows else None


def interpolate_frames(embeddings: Tensor, num_frames: int) -> Tensor:
    """The first frames' own embeddings; beyond the trained number, the whole span stretched linearly (section 3.1)."""
    trained = embeddings.shape[0]
    if num_frames <= trained:
        return embeddings[:num_frames]
    stretched = F.interpolate(embeddings.T[None], size=num_frames, mode="linear", align_corners=True)
    return stretched[0].T
