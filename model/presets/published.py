"""Published models as data, to be described without a download: sizes are those of their own and their experts' files.

An import reads all of this from a checkpoint; no import reads this file.
"""

from __future__ import annotations

from model.config import (
    FlamingoConfig,
    GatedConfig,
    LanguageModelConfig,
    PromptConfig,
    ResamplerConfig,
    VisionConfig,
)

HEAD_DIM = 128
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def _clip(*, dim: int, num_layers: int, num_patches: int, is_idefics: bool) -> VisionConfig:
    return VisionConfig(
        architecture="clip_vit",
        image_size=224,
        patch_size=14,
        feature_dim=dim,
        num_patches=num_patches,
        num_layers=num_layers,
        num_heads=16,
        ffn_dim=4 * dim,
        activation="gelu" if is_idefics else "quick_gelu",
        keep_class_token=is_idefics,
        mean=MEAN,
        std=STD,
        resize="squash" if is_idefics else "crop",
    )


def _resampler(*, dim: int, num_heads: int, head_dim: int, is_idefics: bool) -> ResamplerConfig:
    return ResamplerConfig(
        dim=dim,
        num_layers=6,
        num_heads=num_heads,
        head_dim=head_dim,
        ffn_dim=4 * dim,
        activation="relu" if is_idefics else "gelu",
        qk_norm=is_idefics,
    )


def _idefics(name: str, *, dim: int, ffn_dim: int, num_layers: int) -> FlamingoConfig:
    num_heads = dim // HEAD_DIM
    return FlamingoConfig(
        name=name,
        family="idefics",
        vision=_clip(dim=1280, num_layers=32, num_patches=257, is_idefics=True),
        resampler=_resampler(dim=1280, num_heads=16, head_dim=96, is_idefics=True),
        gated=GatedConfig(
            first_layer=0,
            interval=4,
            num_heads=num_heads,
            head_dim=HEAD_DIM,
            ffn_dim=ffn_dim,
            activation="silu",
            gated_ffn=True,
            norm="rms_norm",
            norm_eps=1e-6,
            qk_norm=True,
        ),
        language_model=LanguageModelConfig(
            family="llama",
            vocab_size=32_000,
            num_new_tokens=2,
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=HEAD_DIM,
            ffn_dim=ffn_dim,
            activation="silu",
            gated_ffn=True,
            max_positions=2048,
            norm="rms_norm",
            norm_eps=1e-6,
            position="rotary",
            rotary_dim=HEAD_DIM,
        ),
        prompt=PromptConfig(media_token="<image>"),
    )


OPENFLAMINGO_9B = FlamingoConfig(
    name="openflamingo-9b",
    family="openflamingo",
    vision=_clip(dim=1024, num_layers=24, num_patches=256, is_idefics=False),
    resampler=_resampler(dim=1024, num_heads=8, head_dim=64, is_idefics=False),
    gated=GatedConfig(first_layer=3, interval=4, num_heads=8, head_dim=64, ffn_dim=4 * 4096, activation="gelu"),
    language_model=LanguageModelConfig(
        family="mpt",
        vocab_size=50_277,
        num_new_tokens=3,
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=HEAD_DIM,
        ffn_dim=4 * 4096,
        activation="gelu",
        max_positions=2048,
        norm="layer_norm",
        norm_eps=1e-5,
        position="alibi",
        tied_head=True,
    ),
    prompt=PromptConfig(media_token="<image>", end_of_chunk="<|endofchunk|>"),
)

MODELS = {
    config.name: config
    for config in (
        OPENFLAMINGO_9B,
        _idefics("idefics-9b", dim=4096, ffn_dim=11_008, num_layers=32),
        _idefics("idefics-80b", dim=8192, ffn_dim=22_016, num_layers=80),
    )
}
