"""The path from pixels to visual tokens: the frozen vision encoder, and the resampler that reads its features.

Normalised pixels [F, 3, h, w] become features [F, P, Dv]. For a CLIP Vision Transformer these are its last hidden state,
before the final norm that only CLIP's own pooling uses; for a convolutional network the last feature map, one feature per
position. Later parts of the networks are not built. A model may append the kin of the frame to each of its features
(`model/kin.py`).

The Perceiver resampler turns any number of features into R visual tokens (Flamingo, section 3.1 and appendix A.1.1).
Learned latents attend to [features; latents], layer by layer. Frames have learned time embeddings, which are interpolated
linearly for a video with more frames than in training; an image is a video of one frame. The paper compares the Perceiver
with a plain transformer and an MLP (table 3), which are the last two classes.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.resampler_attention import resampler_attention
from model.clip_vit import ClipVit
from model.config import ConfigError, ResamplerConfig, VisionConfig
from model.efficientnet import EfficientNetLite0, fold_batch_norms, pack_convolutions
from model.kin import Kin
from model.layers import FeedForward, LayerNorm, learned_rows

TIMM_ENCODERS = "model.timm_encoders"


def normalise(frames: Tensor, config: VisionConfig) -> Tensor:
    """Normalise each channel by the encoder's mean and deviation: uint8 [F, h, w, 3] -> float32 [F, 3, h, w]."""
    mean, std = (_channels(tuple(values), frames.device) for values in (config.mean, config.std))
    return ((frames.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@cache  # a new tensor on a GPU would make the host wait for it
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cached tensor may take part in a backward pass later
        return torch.tensor(values, device=device)


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.kin = Kin(config.kin, config.feature_dim) if config.kin.dim else None
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.with_kin(self.plain_features(pixels))

    def plain_features(self, pixels: Tensor) -> Tensor:
        """Encode frames with the network alone, without their kin."""
        pixels = pixels.to(next(self.encoder.parameters()).dtype)
        return self._hidden_state(pixels) if self.config.architecture == "clip_vit" else self._map(pixels)

    def with_kin(self, features: Tensor) -> Tensor:
        """Append the kin of each frame to features [.., P, Dv], if the model has it and the features do not."""
        return features if self.kin is None or features.shape[-1] == self.config.width else self.kin(features)

    def _hidden_state(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.encoder.forward_features(pixels)
        return features if self.config.keep_class_token else features[:, 1:]

    def _map(self, pixels: Tensor) -> Tensor:
        # several times faster on a CPU than the planar layout
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.encoder.forward_features(pixels)  # [F, Dv, h, w]
        return features.flatten(2).transpose(1, 2)

    def fold_batch_norms(self) -> None:
        """Fold each batch norm of an EfficientNet into the convolution before it. Other networks stay as they are."""
        if isinstance(self.encoder, EfficientNetLite0):
            fold_batch_norms(self.encoder)
        elif not isinstance(self.encoder, ClipVit):
            import_module(TIMM_ENCODERS).fold(self.encoder)

    def pack_convolutions(self) -> None:
        """Pack the convolutions of an EfficientNet for a CPU, if torch has oneDNN. Other networks stay as they are."""
        if isinstance(self.encoder, EfficientNetLite0) and torch.backends.mkldnn.is_available():
            pack_convolutions(self.encoder)

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stay in evaluation mode: training the whole model must not change the frozen encoder's batch statistics."""
        return super().train(False)


def build_encoder(config: VisionConfig) -> Any:
    """Build the network of an architecture. Raises `ConfigError` if it is unknown or has other sizes than `config`."""
    if config.architecture == "clip_vit":
        return ClipVit(config)
    name = config.architecture
    encoder: Any = (
        EfficientNetLite0() if name == "tf_efficientnet_lite0" else import_module(TIMM_ENCODERS).convolutional(name)
    )
    side = -(-config.image_size // encoder.feature_info[-1]["reduction"])
    actual, configured = (encoder.num_features, side * side), (config.feature_dim, config.num_patches)
    if actual != configured:  # some networks round down
        actual = import_module(TIMM_ENCODERS).feature_map(name, config.image_size)
    if actual != configured:
        raise ConfigError(
            f"{name} has {actual} features (width, patches), vision.feature_dim and num_patches are {configured}"
        )
    return encoder


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
    """A feed-forward that begins with a norm; `hidden` replaces the configuration's width."""

    def __init__(self, config: ResamplerConfig, hidden: int | None = None) -> None:
        super().__init__(config.dim, hidden or config.ffn_dim, config.activation)
        self.norm = LayerNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Resampler(nn.Module):
    """The parts that every resampler has: position embeddings of the features, learned latents, layers, a last norm.

    Features [M, F, P, Dv] -> visual tokens [M, R, D]; F and P are free, R is `num_latents`.
    """

    layer_type: ClassVar[type[nn.Module]]

    def __init__(self, config: ResamplerConfig, feature_dim: int) -> None:
        super().__init__()
        self.input_norm = LayerNorm(feature_dim, config.norm_eps) if config.input_norm else nn.Identity()
        self.input = nn.Linear(feature_dim, config.dim) if config.input_projection else nn.Identity()
        self.spatial_embeddings = learned_rows(config.num_spatial, config.dim) if config.num_spatial else None
        self.frame_embeddings = learned_rows(config.num_frames, config.dim) if config.num_frames else None
        self.num_latents = config.num_latents
        self.latents = learned_rows(config.num_latents, config.dim)
        self.layers = nn.ModuleList(self.layer_type(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.dim, config.norm_eps)

    def embed(self, features: Tensor) -> Tensor:
        """Return features [M, F, P, Dv] as [M, F * P, D], with embeddings of their position in the image and in time."""
        features = self.input(self.input_norm(features))
        if self.spatial_embeddings is not None:
            features = features + self.spatial_embeddings
        if self.frame_embeddings is not None:
            times = interpolate_frames(self.frame_embeddings, features.shape[1])  # [F, D]
            features = features + times[:, None]
        return features.flatten(1, 2)


class PerceiverResampler(Resampler):
    layer_type = ResamplerLayer

    def forward(self, features: Tensor) -> Tensor:
        features = self.embed(features)  # [M, N, D]
        latents = self.latents.expand(len(features), -1, -1)  # [M, R, D]
        for layer in self.layers:
            latents = layer(latents, features)
        return self.norm(latents)


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


class MLPLayer(ResamplerFeedForward):
    """A feed-forward without attention, wider so that it has as many parameters as attention and feed-forward together.

    A layer of the Perceiver has four more matrices [D, H * K] and two more norms of 2 D; a hidden unit has 2 D parameters.
    """

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__(config, config.ffn_dim + 2 * config.num_heads * config.head_dim + 2)


class MLPResampler(Resampler):
    """A resampler without attention: each latent reads only the mean of its own group of adjacent features."""

    layer_type = MLPLayer

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


def interpolate_frames(embeddings: Tensor, num_frames: int) -> Tensor:
    """Return the embeddings of `num_frames` frames; if more than trained, they are interpolated linearly (section 3.1)."""
    trained = embeddings.shape[0]
    if num_frames <= trained:
        return embeddings[:num_frames]
    stretched = F.interpolate(embeddings.T[None], size=num_frames, mode="linear", align_corners=True)
    return stretched[0].T
