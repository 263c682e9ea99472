"""What joins the default model's experts: the trained bridge if this repository holds one, else a seeded start.

The start's gates are zero, so that the language model answers as it would alone; the rows of the new tokens are the
mean of the frozen ones, which makes a token that is never likely.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.config import FlamingoConfig
from model.gated_cross_attention import GatedCrossAttention
from model.resampler import PerceiverResampler

SEED = 0
NEW_ROWS = "language_model.embed.new_rows"


def load_bridge(file: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def start_bridge(config: FlamingoConfig, frozen_rows: Tensor) -> dict[str, Tensor]:
    """Everything of the model that is not an expert's, the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        bridge = nn.Module()
        bridge.resampler = PerceiverResampler(config.resampler, config.vision.feature_dim)
        bridge.gated = nn.ModuleDict(
            {
                str(layer): GatedCrossAttention(config.gated, config.language_model.dim, config.resampler.dim)
                for layer in config.gated_layers
            }
        )
    new_rows = frozen_rows.mean(dim=0).repeat(config.language_model.num_new_tokens, 1)
    return {**bridge.state_dict(), NEW_ROWS: new_rows}
