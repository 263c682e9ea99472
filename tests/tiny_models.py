"""Tiny models of the three families, with random weights and open gates, and a byte tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from model.config import (
    AlonePositions,
    FlamingoConfig,
    GatedConfig,
    KinConfig,
    LanguageModelConfig,
    PromptConfig,
    ResamplerConfig,
    VisionConfig,
)
from model.flamingo import Flamingo
from model.prompt import PromptTokenizer

Family = Literal["openflamingo", "idefics", "flamingo"]
FAMILIES: tuple[Family, ...] = ("openflamingo", "idefics", "flamingo")
NUM_BYTES = 256

VISION = VisionConfig(
    architecture="clip_vit",
    image_size=8,
    patch_size=4,
    feature_dim=16,
    num_patches=4,
    num_layers=1,
    num_heads=2,
    ffn_dim=32,
    activation="quick_gelu",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resize="squash",
)

LANGUAGE_MODEL = LanguageModelConfig(
    family="llama",
    vocab_size=NUM_BYTES + 1,
    num_new_tokens=2,
    dim=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    activation="silu",
    gated_ffn=True,
    max_positions=512,
    norm="rms_norm",
    norm_eps=1e-5,
    position="rotary",
    rotary_dim=8,
)

GATED = GatedConfig(first_layer=0, interval=2, num_heads=2, head_dim=16, ffn_dim=64, activation="gelu")
RESAMPLER = ResamplerConfig(
    dim=16, num_layers=2, num_latents=4, num_heads=2, head_dim=8, ffn_dim=32, activation="gelu", num_frames=3
)
PROMPT = PromptConfig(
    media_token="<image>", end_of_chunk="<|endofchunk|>", eos=("<|endofchunk|>", "</s>"), suppressed=("<image>",)
)

CONFIGS: dict[Family, FlamingoConfig] = {
    "openflamingo": FlamingoConfig(
        name="tiny-openflamingo",
        family="openflamingo",
        vision=VISION,
        resampler=RESAMPLER,
        gated=replace(GATED, first_layer=1),
        language_model=replace(
            LANGUAGE_MODEL,
            family="mpt",
            num_kv_heads=4,
            activation="gelu",
            gated_ffn=False,
            norm="layer_norm",
            position="alibi",
            rotary_dim=0,
            tied_head=True,
        ),
        prompt=PROMPT,
    ),
    "idefics": FlamingoConfig(
        name="tiny-idefics",
        family="idefics",
        vision=replace(VISION, keep_class_token=True, num_patches=5, activation="gelu"),
        resampler=replace(RESAMPLER, activation="relu", qk_norm=True),
        gated=replace(
            GATED, norm="rms_norm", activation="silu", gated_ffn=True, qk_norm=True, gate="channel", ffn_dim=48
        ),
        language_model=LANGUAGE_MODEL,
        prompt=replace(PROMPT, media_open="</s>", media_close="</s>", strip_text=True),
    ),
    "flamingo": FlamingoConfig(
        name="tiny-flamingo",
        family="flamingo",
        vision=VISION,
        resampler=replace(RESAMPLER, dim=24, input_projection=True, num_spatial=4, activation="squared_relu"),
        gated=replace(GATED, interval=1, media_norm=True, activation="squared_relu"),
        language_model=replace(LANGUAGE_MODEL, family="chinchilla", activation="gelu", gated_ffn=False, tied_head=True),
        prompt=PROMPT,
    ),
}


def with_alone_positions(config: FlamingoConfig, alone_positions: AlonePositions) -> FlamingoConfig:
    return replace(config, language_model=replace(config.language_model, alone_positions=alone_positions))


def widened(config: FlamingoConfig) -> FlamingoConfig:
    """Return a model whose matrices are wide enough for the formats of weights on a GPU."""
    text = replace(config.language_model, dim=64, head_dim=16, ffn_dim=128)
    text = replace(text, rotary_dim=16) if text.position == "rotary" else text
    gated = replace(config.gated, num_heads=4, ffn_dim=128)
    return replace(config, language_model=text, gated=gated)


KIN_CONFIG = replace(CONFIGS["flamingo"], vision=replace(VISION, kin=KinConfig(dim=3, num_classes=5, num_ancestors=7)))


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one id per byte, then `</s>`, `<image>` and `<|endofchunk|>`."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("</s>", "<image>", "<|endofchunk|>")])
    return tokenizer


def prompt_tokenizer(prompt: PromptConfig = PROMPT) -> PromptTokenizer:
    return PromptTokenizer(byte_tokenizer(), byte_tokenizer(), prompt)


def tiny_model(config: FlamingoConfig, seed: int = 0) -> Flamingo:
    """Create a model with open gates and random weights, large enough for images and positions to change the answer."""
    torch.manual_seed(seed)
    model = Flamingo(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.uniform_(0.5, 1.5)
        elif parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5 * 1.5)
        elif "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if (kin := model.vision.kin) is not None:
        for tensor in (kin.weight, kin.bias, kin.components):
            tensor.normal_()
        kin.ancestors.copy_((torch.rand_like(kin.ancestors) < 0.4).float())
    return model
