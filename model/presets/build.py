"""Build the model folder of a preset: random or given experts, joined by the preset's untrained bridge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint.experts import LanguageExpert, VisionExpert, open_language_expert, open_vision_expert
from model.checkpoint.join import BridgeSizes, joined_config
from model.config import FlamingoConfig
from model.folder import NO_FILES, save_folder
from model.presets.experts import random_language_expert, random_vision_expert
from model.zoo.bridge import start_bridge


def build(
    preset: FlamingoConfig,
    out: Path,
    *,
    language_model: Path | None = None,
    vision_model: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    gate: float = 0.0,
    files: Mapping[str, str | bytes] = NO_FILES,
) -> FlamingoConfig:
    """Write the new folder `out`, named as the model; `dtype` is that of random weights, `gate` the value of each gate.

    A given expert keeps its sizes and weights, and the bridge fits it. Raises `CheckpointError` and `ConfigError`.
    """
    text = open_language_expert(language_model) if language_model else random_language_expert(preset, dtype)
    vision = open_vision_expert(vision_model) if vision_model else random_vision_expert(preset, dtype)
    config = preset_config(preset, text, vision, out.resolve().name)
    experts = vision.tensors | text.tensors
    bridge = {name: _start(name, tensor, gate).to(dtype) for name, tensor in start_bridge(config, experts).items()}
    save_folder(out, config, (experts | bridge).items(), text.tokenizer.to_str(), files=files)
    return config


def preset_config(preset: FlamingoConfig, text: LanguageExpert, vision: VisionExpert, name: str) -> FlamingoConfig:
    """Return the configuration of the preset with these experts; with experts of the preset's sizes it is the preset."""
    resampler = replace(preset.resampler, input_projection=preset.resampler.dim != vision.config.width)
    gated = BridgeSizes(cross_attn_every=preset.gated.interval).gated(text.config)
    return joined_config(text, vision, resampler, gated, name)


def _start(name: str, tensor: Tensor, gate: float) -> Tensor:
    return torch.full_like(tensor, gate) if name.endswith("_gate") else tensor
