"""The paper's three models as data (Flamingo, appendix A.1 and table 1), which `python -m model.describe` counts.

The language model is Chinchilla-like: RMSNorm, GELU, 32,000 tokens, no biases. Chinchilla's relative positions are rotary
here. Weights of these models were never published; the presets are for training.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import FlamingoConfig, GatedConfig, LanguageModelConfig, PromptConfig, ResamplerConfig, VisionConfig

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

PROMPT = PromptConfig(media_token="<image>", end_of_chunk="<EOC>", eos=("<EOC>", "<EOS>"), suppressed=("<image>",))


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


@dataclass(frozen=True, slots=True)
class Published:
    """Numbers of parameters by part, as stated in the paper (table 1)."""

    language_model: float
    vision: float
    gated: float
    resampler: float


PRESETS = {
    config.name: config
    for config in (
        flamingo("flamingo-3b", dim=2048, num_layers=24, num_heads=16, interval=1),
        flamingo("flamingo-9b", dim=4096, num_layers=40, num_heads=32, interval=4),
        flamingo("flamingo-80b", dim=8192, num_layers=80, num_heads=64, interval=7),
    )
}

PUBLISHED = {
    "flamingo-3b": Published(language_model=1.4e9, vision=435e6, gated=1.2e9, resampler=194e6),
    "flamingo-9b": Published(language_model=7.1e9, vision=435e6, gated=1.6e9, resampler=194e6),
    "flamingo-80b": Published(language_model=70e9, vision=435e6, gated=10e9, resampler=194e6),
}
# Published figures that do not follow from the paper's own table of layers and widths (appendix C.1).
DOES_NOT_FOLLOW = {
    ("flamingo-9b", "gated"): " *",
    ("flamingo-9b", "language_model"): " +",
    ("flamingo-80b", "gated"): " *",
}
NOTES = {
    " *": "does not follow from the paper's own layers and widths",
    " +": "40 layers of width 4096 have more than 7.1 B parameters in any variant",
}
