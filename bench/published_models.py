"""Published models in their own sizes, and with random weights: OpenFlamingo 3B and 9B, and IDEFICS 9B.

Speed does not depend on training, so no model has to be downloaded. Nothing here needs the packages of the server.
"""

from __future__ import annotations

import torch

from kernels.bench.sizes import IDEFICS_9B, OF_3B, OF_9B, TOY, Spec
from model.config import (
    FlamingoConfig,
    GatedConfig,
    LanguageModelConfig,
    PromptConfig,
    ResamplerConfig,
    VisionConfig,
)
from model.flamingo import Flamingo

MAX_TOKENS = 2048
NUM_NEW_TOKENS = 2
GREY = (0.5, 0.5, 0.5)
PROMPT = PromptConfig(media_token="<image>")


def _clip(
    *, dim: int, num_layers: int, num_heads: int, side: int = 224, patch: int = 14, class_token: bool
) -> VisionConfig:
    return VisionConfig(
        architecture="clip_vit", image_size=side, patch_size=patch, feature_dim=dim,
        num_patches=(side // patch) ** 2 + class_token, num_layers=num_layers, num_heads=num_heads, ffn_dim=4 * dim,
        activation="gelu" if class_token else "quick_gelu", keep_class_token=class_token, mean=GREY, std=GREY,
        resize="squash",
    )  # fmt: skip


CLIP_VIT_L = _clip(dim=1024, num_layers=24, num_heads=16, class_token=False)
CLIP_VIT_H = _clip(dim=1280, num_layers=32, num_heads=16, class_token=True)
CLIP_TOY = _clip(dim=32, num_layers=1, num_heads=2, side=32, patch=16, class_token=False)


def openflamingo(spec: Spec, *, qk_norm: bool, vision: VisionConfig = CLIP_VIT_L) -> FlamingoConfig:
    """Return an OpenFlamingo with MPT, in the sizes of a spec."""
    text = LanguageModelConfig(
        family="mpt", vocab_size=spec.vocab_size, num_new_tokens=NUM_NEW_TOKENS, dim=spec.dim,
        num_layers=spec.num_layers, num_heads=spec.num_heads, num_kv_heads=spec.num_heads, head_dim=spec.head_dim,
        ffn_dim=spec.ffn_dim, activation="gelu", max_positions=MAX_TOKENS, norm="layer_norm", norm_eps=1e-5,
        position="alibi", qk_norm=qk_norm, tied_head=True,
    )  # fmt: skip
    resampler = ResamplerConfig(
        dim=spec.media_dim, num_layers=6, num_latents=spec.num_latents, num_heads=8, head_dim=64,
        ffn_dim=4 * spec.media_dim, activation="gelu",
    )  # fmt: skip
    gated = GatedConfig(
        first_layer=spec.interval - 1, interval=spec.interval, num_heads=spec.media_heads,
        head_dim=spec.media_head_dim, ffn_dim=spec.ffn_dim, activation="gelu",
    )  # fmt: skip
    return FlamingoConfig(
        name=spec.name, family="openflamingo", vision=vision, resampler=resampler, gated=gated, language_model=text,
        prompt=PROMPT,
    )  # fmt: skip


def idefics(spec: Spec) -> FlamingoConfig:
    """Return an IDEFICS in the sizes of a spec."""
    text = LanguageModelConfig(
        family="llama", vocab_size=spec.vocab_size, num_new_tokens=NUM_NEW_TOKENS, dim=spec.dim,
        num_layers=spec.num_layers, num_heads=spec.num_heads, num_kv_heads=spec.num_heads, head_dim=spec.head_dim,
        ffn_dim=spec.ffn_dim, activation="silu", gated_ffn=True, max_positions=MAX_TOKENS, norm="rms_norm",
        norm_eps=1e-6, position="rotary", rotary_dim=spec.head_dim,
    )  # fmt: skip
    resampler = ResamplerConfig(
        dim=spec.media_dim, num_layers=6, num_latents=spec.num_latents, num_heads=16, head_dim=96,
        ffn_dim=4 * spec.media_dim, activation="relu", qk_norm=True,
    )  # fmt: skip
    gated = GatedConfig(
        first_layer=0, interval=spec.interval, num_heads=spec.media_heads, head_dim=spec.media_head_dim,
        ffn_dim=spec.ffn_dim, activation="silu", gated_ffn=True, norm="rms_norm", qk_norm=True, gate="channel",
    )  # fmt: skip
    return FlamingoConfig(
        name=spec.name, family="idefics", vision=CLIP_VIT_H, resampler=resampler, gated=gated, language_model=text,
        prompt=PROMPT,
    )  # fmt: skip


SPECS = {spec.name: spec for spec in (OF_3B, OF_9B, IDEFICS_9B)}
PUBLISHED = {
    "OF-3B": openflamingo(OF_3B, qk_norm=True),  # MPT-1B
    "OF-9B": openflamingo(OF_9B, qk_norm=False),  # MPT-7B
    "IDEFICS-9B": idefics(IDEFICS_9B),
}
TOY_MODEL = openflamingo(TOY, qk_norm=False, vision=CLIP_TOY)
CONFIGS = {**PUBLISHED, TOY.name: TOY_MODEL}


@torch.no_grad()
def random_weights(config: FlamingoConfig, device: torch.device, dtype: torch.dtype) -> Flamingo:
    """Return a model on a device with normal weights (std 0.02) and open gates, without a copy in host memory."""
    with torch.device("meta"):
        model = Flamingo(config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model
