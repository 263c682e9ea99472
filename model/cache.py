"""The two caches a forward may be handed: text keys and values in blocks, media keys and values in pages.

Both are plain tensors with a view a layer. Who fills a block or a page, and when, is the engine's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.config import FlamingoConfig


@dataclass(frozen=True, slots=True)
class KVCache:
    """Text keys and values of all layers: [L, N, 2, G, B, K], N blocks of B tokens."""

    blocks: Tensor
    _layers: tuple[Tensor, ...] = field(init=False, repr=False)  # views, made once

    def __post_init__(self) -> None:
        object.__setattr__(self, "_layers", self.blocks.unbind(0))

    @classmethod
    def zeros(
        cls, config: FlamingoConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        lm = config.language_model
        shape = (lm.num_layers, num_blocks, 2, lm.num_kv_heads, block_size, lm.head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device))

    def layer(self, index: int) -> Tensor:
        return self._layers[index]  # [N, 2, G, B, K]


@dataclass(frozen=True, slots=True)
class MediaCache:
    """Media keys and values of all gated layers: pages [M, X, H, 2, R, K], one contiguous slab a media.

    Training and the reference hand the forward one that was freshly projected; serving, one that lives on.
    """

    pages: Tensor
    layer_of: dict[int, int]  # language-model layer -> place among the gated layers

    @classmethod
    def zeros(
        cls, config: FlamingoConfig, num_pages: int, dtype: torch.dtype, device: torch.device | str
    ) -> MediaCache:
        gated, layers = config.gated, config.gated_layers
        shape = (num_pages, len(layers), gated.num_heads, 2, config.resampler.num_latents, gated.head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), {layer: x for x, layer in enumerate(layers)})

    def layer(self, index: int) -> Tensor:
        return self.pages[:, self.layer_of[index]]  # [M, H, 2, R, K]
