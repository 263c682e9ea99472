"""The paper's three models as data: sizes are those of its appendix A.1 and table 1.

The language model is Chinchilla-like: RMSNorm, GELU, 32,000 tokens, no biases. Chinchilla's relative positions are rotary
here. Weights were never published; a preset is a start for training.
"""

from __future__ import annotations

from model.config import (
    ConfigError,
    FlamingoConfig,
    GatedConfig,
    LanguageModelConfig,
    PromptConfig,
    ResamplerConfig,
    VisionConfig,
)

HEAD_DIM = 128
VOCABULARY = 32_000

NFNET_F6 = VisionConfig(
    architecture="dm_nfnet_f6",
    image_size=320,
    feature_dim=3072,
    num_patches=100,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    resize="pad",
)

RESAMPLER = ResamplerConfig(
    dim=1536,
    num_layers=6,
    num_heads=16,
    head_dim=HEAD_DIM,
    ffn_dim=4 * 1536,
    activation="squared_relu",
    num_frames=8,
    input_projection=True,
)

END_OF_TEXT = "<EOS>"
PROMPT = PromptConfig(media_token="<image>", end_of_chunk="<EOC>", eos=("<EOC>", END_OF_TEXT), suppressed=("<image>",))


def chinchilla(*, dim: int, num_layers: int, num_heads: int) -> LanguageModelConfig:
    return LanguageModelConfig(
        family="chinchilla",
        vocab_size=VOCABULARY,
        num_new_tokens=2,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=HEAD_DIM,
        ffn_dim=4 * dim,
        activation="gelu",
        max_positions=2048,
        norm="rms_norm",
        norm_eps=1e-6,
        position="rotary",
        rotary_dim=HEAD_DIM,
        tied_head=True,
    )


def flamingo(name: str, *, dim: int, num_layers: int, num_heads: int, interval: int) -> FlamingoConfig:
    return FlamingoConfig(
        name=name,
        family="flamingo",
        vision=NFNET_F6,
        resampler=RESAMPLER,
        gated=GatedConfig(
            first_layer=0,
            interval=interval,
            num_heads=num_heads,
            head_dim=HEAD_DIM,
            ffn_dim=4 * dim,
            activation="squared_relu",
            media_norm=True,
        ),
        language_model=chinchilla(dim=dim, num_layers=num_layers, num_heads=num_heads),
        prompt=PROMPT,
    )


PRESETS = {
    config.name: config
    for config in (
        flamingo("flamingo-3b", dim=2048, num_layers=24, num_heads=16, interval=1),
        flamingo("flamingo-9b", dim=4096, num_layers=40, num_heads=32, interval=4),
        flamingo("flamingo-80b", dim=8192, num_layers=80, num_heads=64, interval=7),
    )
}


def find_preset(name: str) -> FlamingoConfig:
    if name not in PRESETS:
        raise ConfigError(f"{name!r} is not a preset, must be one of {', '.join(PRESETS)}")
    return PRESETS[name]
