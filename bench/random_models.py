"""Model folders with random weights: speed does not depend on training, so no model has to be downloaded.

Each folder is built once, in a cache. The tokenizer has one token per byte; unused tokens fill the rest of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bench.published_models import PUBLISHED, random_weights
from model.config import (
    FlamingoConfig,
    GatedConfig,
    LanguageModelConfig,
    PromptConfig,
    ResamplerConfig,
    VisionConfig,
)
from model.flamingo import Flamingo
from model.folder import save_folder

BEGIN, END, MEDIA, FAKE = "<s>", "</s>", "<image>", "<fake_token_around_image>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The widths of an IDEFICS-like model. Heads have 64 channels where the width allows."""

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    interval: int
    vocab_size: int
    vision_dim: int
    vision_layers: int
    vision_heads: int
    image_size: int
    patch_size: int
    num_latents: int
    resampler_layers: int

    @property
    def resampler_head_dim(self) -> int:
        return self.vision_dim // self.vision_heads


SIZES = {
    "tiny": Size(
        dim=32,
        num_layers=4,
        num_heads=2,
        ffn_dim=64,
        interval=2,
        vocab_size=320,
        vision_dim=32,
        vision_layers=1,
        vision_heads=2,
        image_size=32,
        patch_size=16,
        num_latents=4,
        resampler_layers=1,
    ),
    # A language model with GPT-2's widths and a ViT-B/16.
    "200m": Size(
        dim=768,
        num_layers=16,
        num_heads=12,
        ffn_dim=2048,
        interval=4,
        vocab_size=32000,
        vision_dim=768,
        vision_layers=12,
        vision_heads=12,
        image_size=224,
        patch_size=16,
        num_latents=64,
        resampler_layers=6,
    ),
}


# of every random model
PROMPT = PromptConfig(
    media_token=MEDIA, begin=BEGIN, media_open=FAKE, media_close=FAKE, strip_text=True, eos=(END,), suppressed=(FAKE, MEDIA)
)  # fmt: skip


NAMES = (*SIZES, *PUBLISHED)


def tokenizer(size: Size | LanguageModelConfig) -> Tokenizer:
    """Return a tokenizer with one id per byte, fillers up to the vocabulary's size, then IDEFICS's two media markers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [BEGIN, END, *letters]
    tokens += [f"filler{i}" for i in range(size.vocab_size - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (BEGIN, END, FAKE, MEDIA)])
    return tokenizer


def config(name: str, size: Size) -> FlamingoConfig:
    grid = size.image_size // size.patch_size
    return FlamingoConfig(
        name=f"random-{name}",
        family="idefics",
        vision=VisionConfig(
            architecture="clip_vit",
            image_size=size.image_size,
            patch_size=size.patch_size,
            feature_dim=size.vision_dim,
            num_patches=grid * grid + 1,
            num_layers=size.vision_layers,
            num_heads=size.vision_heads,
            ffn_dim=4 * size.vision_dim,
            keep_class_token=True,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            resize="squash",
        ),
        resampler=ResamplerConfig(
            dim=size.vision_dim,
            num_layers=size.resampler_layers,
            num_latents=size.num_latents,
            num_heads=size.vision_heads,
            head_dim=size.resampler_head_dim,
            ffn_dim=4 * size.vision_dim,
            activation="relu",
            qk_norm=True,
        ),
        gated=GatedConfig(
            first_layer=0,
            interval=size.interval,
            num_heads=size.num_heads,
            head_dim=size.dim // size.num_heads,
            ffn_dim=size.ffn_dim,
            activation="silu",
            gated_ffn=True,
            norm="rms_norm",
            norm_eps=1e-6,
            qk_norm=True,
            gate="channel",
        ),
        language_model=_language_model(size),
        prompt=PROMPT,
    )


def _language_model(size: Size) -> LanguageModelConfig:
    return LanguageModelConfig(
        family="llama",
        vocab_size=size.vocab_size,
        num_new_tokens=2,
        dim=size.dim,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=size.num_heads,
        head_dim=size.dim // size.num_heads,
        ffn_dim=size.ffn_dim,
        activation="silu",
        gated_ffn=True,
        max_positions=2048,
        norm="rms_norm",
        norm_eps=1e-6,
        position="rotary",
        rotary_dim=size.dim // size.num_heads,
    )


def folder(name: str) -> Path:
    """Return the folder of a random model, and build the folder first if it does not exist."""
    if name in PUBLISHED:
        return _published(name)
    path = cache_folder(f"random-{name}", asdict(SIZES[name]))
    if not (path / "config.json").exists():
        model = random_model(config(name, SIZES[name]))
        save_folder(path, model.config, model.state_dict().items(), tokenizer(SIZES[name]).to_str())
    return path


def _published(name: str) -> Path:
    """Return the folder of a published model with random weights in bfloat16: up to 19 GB."""
    config = replace(PUBLISHED[name], name=f"random-{name}", prompt=PROMPT)
    path = cache_folder(f"random-{name}", asdict(config))
    if not (path / "config.json").exists():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        tensors = random_weights(config, device, torch.bfloat16).state_dict().items()
        save_folder(path, config, tensors, tokenizer(config.language_model).to_str())
    return path


def random_model(config: FlamingoConfig, seed: int = 0) -> Flamingo:
    """Return a model with normal weights (std 0.02) and open gates, so that images influence the answer."""
    torch.manual_seed(seed)
    model = Flamingo(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.fill_(1.0)
        elif parameter.ndim > 1:
            parameter.normal_(std=0.02)
    return model


def cache_folder(name: str, inputs: dict[str, Any]) -> Path:
    """Return the path of a folder in the cache, whose name ends in a digest of the inputs that it is built from."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / "flamboyance-bench" / f"{name}-{digest}"
