"""The scales of a preset: full, and tiny for tests and trials on any machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from model.config import FlamingoConfig, GatedConfig, LanguageModelConfig, ResamplerConfig

Scale = Literal["full", "tiny"]

# the number and the width of heads are divided by this factor, and widths that are their product by its square
HEADS_DIVISOR = 8
WIDTH_DIVISOR = HEADS_DIVISOR**2
# a network of the family of NFNet-F6, with as many features of an image, but 192 wide
TINY_NETWORK, TINY_FEATURE_DIM = "test_nfnet", 192
# one token per byte, and the end of text
TINY_VOCABULARY = 257


def at_scale(preset: FlamingoConfig, scale: Scale) -> FlamingoConfig:
    return tiny(preset) if scale == "tiny" else preset


def tiny(preset: FlamingoConfig) -> FlamingoConfig:
    """Return the preset with small widths, few heads and a small vocabulary; everything else is the preset's.

    Depths and gated layers are the same, and so are latents, patches, frames, norms and activations.
    """
    resampler, text = preset.resampler, preset.language_model
    return replace(
        preset,
        name=f"{preset.name}-tiny",
        vision=replace(preset.vision, architecture=TINY_NETWORK, feature_dim=TINY_FEATURE_DIM),
        resampler=replace(resampler, dim=resampler.dim // WIDTH_DIVISOR, **_small_layers(resampler)),
        gated=replace(preset.gated, **_small_layers(preset.gated)),
        language_model=replace(
            text,
            vocab_size=TINY_VOCABULARY,
            dim=text.dim // WIDTH_DIVISOR,
            num_kv_heads=text.num_kv_heads // HEADS_DIVISOR,
            rotary_dim=text.rotary_dim // HEADS_DIVISOR,
            **_small_layers(text),
        ),
    )


def _small_layers(config: ResamplerConfig | GatedConfig | LanguageModelConfig) -> dict[str, Any]:
    """Return the sizes of a layer's heads and of its feed-forward."""
    return {
        "num_heads": config.num_heads // HEADS_DIVISOR,
        "head_dim": config.head_dim // HEADS_DIVISOR,
        "ffn_dim": config.ffn_dim // WIDTH_DIVISOR,
    }
