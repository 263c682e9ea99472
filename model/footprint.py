"""The memory that a model needs on each device: weights, and keys and values of text and of media.

Everything is counted on the meta device, so no device needs to hold the model to find how many ranks it needs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from model.config import FlamingoConfig
from model.flamingo import Flamingo
from model.quantised import QuantisedLinear, WeightFormat, replace_linears
from model.ranks import ALONE, Parts, Rank, rank_config, sizes_of

# content of the smallest useful cache: one request of the maximum length, with 32 shots and a query
NUM_MEDIA = 33
# share of a device's memory for everything else: activations, libraries, fragmentation
RESERVED = 0.1


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes that one rank holds: weights by part, keys and values per token of text and per media item."""

    weights: dict[str, int]
    token: int
    page: int
    max_tokens: int

    @classmethod
    def of(
        cls,
        config: FlamingoConfig,
        dtype: torch.dtype,
        rank: Rank = ALONE,
        weight_format: WeightFormat | None = None,
    ) -> Footprint:
        """Count the bytes of one rank. Raises `ConfigError` if the model cannot be divided into this number of ranks.

        `weight_format` is the format of packed matrices on a GPU; a divided model has none.
        """
        divided, parts, weights = rank_config(config, rank), Parts(config, rank), Counter[str]()
        loaded, packed = _tensors(config, weight_format)
        for name, shape in loaded.items():
            part = parts.get(name)
            share = 1.0 if part is None else sum(map(len, part.ranges)) / shape[part.axis]
            weights[name.partition(".")[0]] += round(share * prod(shape)) * dtype.itemsize
        weights.update(packed)
        return cls(
            dict(weights),
            token_bytes(divided, dtype),
            page_bytes(divided, dtype),
            divided.language_model.max_positions,
        )

    @property
    def needed(self) -> int:
        """The bytes of the weights, and of the caches of one request of the maximum length with 33 media."""
        return sum(self.weights.values()) + self.max_tokens * self.token + NUM_MEDIA * self.page

    def fits(self, device_bytes: int) -> bool:
        return self.needed <= (1 - RESERVED) * device_bytes


@lru_cache(maxsize=2)
def _tensors(
    config: FlamingoConfig, weight_format: WeightFormat | None
) -> tuple[dict[str, tuple[int, ...]], Counter[str]]:
    """Return the shapes of the weights in the model's dtype, and the bytes of packed weights by part."""
    packed: Counter[str] = Counter()
    with torch.device("meta"):
        model = Flamingo(config)
        if weight_format is not None:
            replace_linears(weight_format, model.language_model.layers, model.gated)
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            packed[name.partition(".")[0]] += sum(buffer.nbytes for buffer in module.buffers(recurse=False))
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}, packed


def token_bytes(config: FlamingoConfig, dtype: torch.dtype) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    text = config.language_model
    return prod((text.num_layers, 2, text.num_kv_heads, text.head_dim, dtype.itemsize))


def page_bytes(config: FlamingoConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one media page: keys and values of all gated layers."""
    gated = config.gated
    return prod(
        (len(config.gated_layers), gated.num_heads, 2, config.resampler.num_latents, gated.head_dim, dtype.itemsize)
    )


def smallest_size(config: FlamingoConfig, dtype: torch.dtype, device_bytes: int) -> int | None:
    """Return the smallest number of ranks with which a model fits, or None."""
    return next(
        (size for size in sizes_of(config) if Footprint.of(config, dtype, Rank(0, size)).fits(device_bytes)), None
    )
