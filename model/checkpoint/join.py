"""Join a frozen decoder and a frozen vision encoder by a new bridge, which is not trained yet.

The bridge is the paper's: 64 visual tokens per image or video, gated layers before layers 0, n, 2n, ..., squared ReLU, and
heads like the decoder's. Its gates are zero, so the model's outputs equal those of the decoder alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.checkpoint.experts import LanguageExpert, VisionExpert, open_language_expert, open_vision_expert
from model.config import ConfigError, FlamingoConfig, GatedConfig, LanguageModelConfig, ResamplerConfig, VisionConfig
from model.folder import NO_FILES, save_folder
from model.zoo.bridge import start_bridge

# width of the resampler's heads
HEAD_DIM = 64
# the interval of the gated layers in the paper's 9B model
INTERVAL = 4
# frames with a learned embedding; the embeddings of longer videos are interpolated
NUM_FRAMES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeSizes:
    """The sizes of a new bridge; `None`: derived from the experts."""

    # a gated layer precedes every n-th layer; None: 4, or the number of layers if that is smaller
    cross_attn_every: int | None = None
    num_latents: int = 64
    resampler_layers: int = 6
    # None: the width of the encoder's features
    resampler_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("cross_attn_every", "num_latents", "resampler_layers", "resampler_dim"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}, must be positive")

    def resampler(self, vision: VisionConfig) -> ResamplerConfig:
        dim = self.resampler_dim or vision.feature_dim
        return ResamplerConfig(
            dim=dim,
            num_layers=self.resampler_layers,
            num_latents=self.num_latents,
            num_heads=max(1, dim // HEAD_DIM),
            head_dim=HEAD_DIM,
            ffn_dim=4 * dim,
            activation="squared_relu",
            num_frames=NUM_FRAMES,
            input_projection=dim != vision.width,
        )

    def gated(self, language_model: LanguageModelConfig) -> GatedConfig:
        num_layers = language_model.num_layers
        interval = self.cross_attn_every or min(INTERVAL, num_layers)
        if interval > num_layers:
            raise ConfigError(f"cross_attn_every is {interval}, but the language model has {num_layers} layers")
        return GatedConfig(
            first_layer=0,
            interval=interval,
            num_heads=language_model.num_heads,
            head_dim=language_model.head_dim,
            ffn_dim=4 * language_model.dim,
            activation="squared_relu",
            media_norm=True,
        )


def join(
    *,
    language_model: Path,
    vision_model: Path,
    out: Path,
    sizes: BridgeSizes,
    files: Mapping[str, str | bytes] = NO_FILES,
) -> FlamingoConfig:
    """Write the experts of two folders and an untrained bridge to the new folder `out`, with further text files by name.

    The model's name is the folder's. Raises `CheckpointError` and `ConfigError`.
    """
    text, vision = open_language_expert(language_model), open_vision_expert(vision_model)
    resampler, gated = sizes.resampler(vision.config), sizes.gated(text.config)
    config = joined_config(text, vision, resampler, gated, out.resolve().name)
    experts = vision.tensors | text.tensors
    tensors = experts | start_bridge(config, experts)
    save_folder(out, config, tensors.items(), text.tokenizer.to_str(), files=files)
    return config


def joined_config(
    text: LanguageExpert, vision: VisionExpert, resampler: ResamplerConfig, gated: GatedConfig, name: str
) -> FlamingoConfig:
    return FlamingoConfig(
        name=name,
        family="flamingo",
        vision=vision.config,
        resampler=resampler,
        gated=gated,
        language_model=text.config,
        prompt=text.prompt,
    )
