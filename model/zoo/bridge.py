"""The bridge between two experts: a seeded start for training, and the default model's trained one on disk.

On disk, matrices are int8 with a float16 scale per row; all other tensors are float32.
The initial gates are zero, so the language model answers as it would alone. The rows of new tokens are the mean of the
frozen rows, which makes these tokens unlikely.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.config import FlamingoConfig
from model.flamingo import GatedCrossAttention
from model.kin import ANCESTORS, COMPONENTS, principal_components
from model.vision import PerceiverResampler, Resampler, ResamplerLayer, build_resampler

SEED = 0
# the token tables; a tied model has no head
TABLES = ("language_model.embed", "language_model.head")
SCALE = ".scale"

# large compared with the default encoder's features, whose elements are between 0 and 6, and mostly near 0
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
    """Return int8 of the matrix' shape, and the float16 scale of each row; a row of zeros has scale one."""
    largest = matrix.float().abs().amax(-1)
    # rounded up to a float16, so that the row's largest element is at most 127 scales
    scale = torch.where(largest > 0, largest / 127 * (1 + 2**-10), 1.0).half()
    rows = (matrix.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return rows.to(torch.int8), scale


def load_bridge(file: Path) -> dict[str, Tensor]:
    """Load every tensor in float32."""
    stored = load_file(file)
    return {name: _dequantised(name, tensor, stored) for name, tensor in stored.items() if not name.endswith(SCALE)}


def _dequantised(name: str, tensor: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    scale = stored.get(name + SCALE)
    return tensor.float() if scale is None else tensor.float() * scale.float()[:, None]


def start_bridge(config: FlamingoConfig, experts: Mapping[str, Tensor], seed: int = SEED) -> dict[str, Tensor]:
    """Return the initial values of all tensors that are not an expert's; the same seed gives the same values.

    `experts` has the language model's token tables under their full names, and the ancestors of classes if the model uses
    kin.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bridge = nn.Module()
        bridge.resampler = build_resampler(config.resampler, config.vision.width)
        start_as_mean(bridge.resampler)
        bridge.gated = nn.ModuleDict(
            {
                str(layer): GatedCrossAttention(config.gated, config.language_model.dim, config.resampler.dim)
                for layer in config.gated_layers
            }
        )
    rows = _new_rows(config.language_model.num_new_tokens, experts)
    return {**bridge.state_dict(), **rows, **_kin_components(config.vision.kin.dim, experts)}


def _new_rows(number: int, experts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tables = [table for table in TABLES if number and f"{table}.weight" in experts]
    return {
        f"{table}.new_rows": experts[f"{table}.weight"].mean(dim=0, dtype=torch.float32).repeat(number, 1)
        for table in tables
    }


def _kin_components(dim: int, experts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the directions of kin, unless the experts have them."""
    return {COMPONENTS: principal_components(experts[ANCESTORS], dim)} if dim and COMPONENTS not in experts else {}


@torch.no_grad()
def start_as_mean(resampler: Resampler) -> None:
    """Initialise the resampler so that visual tokens are a random projection of the mean feature.

    A random projection preserves distances (Johnson and Lindenstrauss, 1984), so visual tokens distinguish what the encoder
    distinguishes before any training. Values and outputs are the identity, feed-forwards zero, and queries and keys small,
    so attention is uniform. The norm before the attention would scale the features of an empty patch up to those of a full
    one. A constant bias that is large compared with all features makes the norm a constant factor, which its scale undoes.
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
