"""What joins the default model's experts: the trained bridge if this repository holds one, else a seeded start.

On disk a matrix is 8-bit rows and a float16 scale a row, everything else float32.
The start's gates are zero, so that the language model answers as it would alone; the rows of the new tokens are the
mean of the frozen ones, which makes a token that is never likely.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.config import FlamingoConfig
from model.gated_cross_attention import GatedCrossAttention
from model.resampler import PerceiverResampler, Resampler, ResamplerLayer
from model.resampler_ablations import build_resampler

SEED = 0
NEW_ROWS = "language_model.embed.new_rows"


SCALE = ".scale"

# beside the default encoder's features, whose entries are between 0 and 6, and mostly near 0
BIAS = 3.0
LATENTS = 0.3


def save_bridge(file: Path, bridge: Mapping[str, Tensor]) -> None:
    stored: dict[str, Tensor] = {}
    for name, tensor in bridge.items():
        if tensor.dim() == 2 and name.endswith(".weight"):
            stored[name], stored[name + SCALE] = quantise_rows(tensor)
        else:
            stored[name] = tensor.float().contiguous()
    save_file(stored, file)


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of the matrix' shape, and the float16 scale of each row. A row of zeros has scale one."""
    largest = matrix.float().abs().amax(-1)
    # rounded up to a float16, so that the row's largest number stays within 127 of them
    scale = torch.where(largest > 0, largest / 127 * (1 + 2**-10), 1.0).half()
    rows = (matrix.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return rows.to(torch.int8), scale


def load_bridge(file: Path) -> dict[str, Tensor]:
    """Every tensor in float32."""
    stored = load_file(file)
    return {name: _whole(name, tensor, stored) for name, tensor in stored.items() if not name.endswith(SCALE)}


def _whole(name: str, tensor: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    scale = stored.get(name + SCALE)
    return tensor.float() if scale is None else tensor.float() * scale.float()[:, None]


def start_bridge(config: FlamingoConfig, frozen_rows: Tensor) -> dict[str, Tensor]:
    """Everything of the model that is not an expert's, the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        bridge = nn.Module()
        bridge.resampler = build_resampler(config.resampler, config.vision.feature_dim)
        start_as_mean(bridge.resampler)
        bridge.gated = nn.ModuleDict(
            {
                str(layer): GatedCrossAttention(config.gated, config.language_model.dim, config.resampler.dim)
                for layer in config.gated_layers
            }
        )
    new_rows = frozen_rows.mean(dim=0).repeat(config.language_model.num_new_tokens, 1)
    return {**bridge.state_dict(), NEW_ROWS: new_rows}


@torch.no_grad()
def start_as_mean(resampler: Resampler) -> None:
    """Visual tokens that begin as the mean feature in other coordinates: what the encoder tells apart, they tell apart.

    Any picture's, since nothing of it is learned: a random projection keeps the distances (Johnson and Lindenstrauss,
    1984). Values and outputs are the identity, feed-forwards silent, queries and keys small, hence attention even.
    Left to itself, the norm in front of the attention would make an empty place of a picture as long as a full one; a
    bias that is the same everywhere and long beside all features makes the norm a constant, which its own scale undoes.
    """
    if not isinstance(resampler, PerceiverResampler) or not isinstance(resampler.input, nn.Linear):
        return
    nn.init.orthogonal_(resampler.input.weight)
    signs = torch.ones_like(resampler.input.bias)
    signs[: len(signs) // 2] = -1.0
    resampler.input.bias.copy_(BIAS * signs)
    resampler.latents.normal_(std=LATENTS)
    for layer in resampler.layers:
        assert isinstance(layer, ResamplerLayer)
        attention = layer.attention
        attention.media_norm.load_state_dict({"weight": torch.full_like(signs, BIAS), "bias": -BIAS * signs})
        nn.init.eye_(attention.key_value.weight[len(attention.key_value.weight) // 2 :])
        nn.init.eye_(attention.output.weight)
        nn.init.zeros_(layer.feed_forward.down.weight)
