"""Tensor parallelism by heads: the part of every tensor that each rank holds. This module does not import torch.

Each rank has an equal part of the heads and of the hidden features of every feed-forward, in the decoder and in the gated
layers: rows of the first matrix of a branch, and the corresponding columns of the second. Each rank has a whole copy of the
vision encoder, the resampler, the norms and the token tables. A rank's model is an ordinary model with a smaller
configuration; `model/parallel.py` adds up the results of the ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from model.config import ConfigError, FlamingoConfig, GatedConfig, LanguageModelConfig

# by which a model is divided, the largest setting `tensor_parallel`
MAX_RANKS = 64
# the number of a layer in the name of a tensor
LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the `size` processes that compute a model together."""

    number: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.size:
            raise ValueError(f"rank {self.number} is not below the number of ranks, {self.size}")

    def part_of(self, count: int) -> range:
        """Return this rank's part of `count` items; if there are fewer items than ranks, ranks share them."""
        first = count * self.number // self.size
        return range(first, max(first + 1, count * (self.number + 1) // self.size))


ALONE = Rank()


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a tensor that a rank holds: ranges of one axis, one after the other."""

    axis: int
    ranges: tuple[range, ...]

    def indices(self) -> Iterator[tuple[slice, ...]]:
        for numbers in self.ranges:
            yield (slice(None),) * self.axis + (slice(numbers.start, numbers.stop),)


def rank_config(config: FlamingoConfig, rank: Rank) -> FlamingoConfig:
    """Return the configuration of a rank's model. Raises `ConfigError` if the model cannot be divided equally."""
    text, gated, size = config.language_model, config.gated, rank.size
    divided = {
        "language_model.num_heads": text.num_heads,
        "language_model.ffn_dim": text.ffn_dim,
        "gated.num_heads": gated.num_heads,
        "gated.ffn_dim": gated.ffn_dim,
    }
    for name, count in divided.items():
        if count % size:
            raise ConfigError(f"{config.name} cannot be divided by {size}: {name} is {count}")
    if text.num_kv_heads % size and size % text.num_kv_heads:
        raise ConfigError(
            f"{config.name} cannot be divided by {size}: language_model.num_kv_heads is {text.num_kv_heads}, "
            "neither a multiple nor a divisor"
        )
    return replace(
        config,
        language_model=replace(
            text,
            num_heads=text.num_heads // size,
            num_kv_heads=max(text.num_kv_heads // size, 1),
            ffn_dim=text.ffn_dim // size,
        ),
        gated=replace(gated, num_heads=gated.num_heads // size, ffn_dim=gated.ffn_dim // size),
    )


def sizes_of(config: FlamingoConfig) -> list[int]:
    """Return the numbers of ranks by which a model can be divided."""
    return [size for size in range(1, MAX_RANKS + 1) if _divides(config, size)]


def _divides(config: FlamingoConfig, size: int) -> bool:
    try:
        rank_config(config, Rank(0, size))
    except ConfigError:
        return False
    return True


class Parts:
    """The parts of a model's tensors that a rank holds, by the names of the tensors."""

    def __init__(self, config: FlamingoConfig, rank: Rank) -> None:
        text, gated = config.language_model, config.gated
        self._parts: dict[str, Part] = {}
        if rank.size > 1:
            layers = {**_self_attention(text, rank), **_feed_forward(text, rank)}
            media_layers = {**_media_attention(gated, rank), **_feed_forward(gated, rank)}
            self._parts |= {f"language_model.layers.N.{name}": part for name, part in layers.items()}
            self._parts |= {f"gated.N.{name}": part for name, part in media_layers.items()}

    def get(self, name: str) -> Part | None:
        """Return the part of a tensor, or None if each rank holds the whole."""
        return self._parts.get(LAYER.sub(".N.", name))


def _self_attention(config: LanguageModelConfig, rank: Rank) -> dict[str, Part]:
    width, key_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    query = _features(config.num_heads, config.head_dim, rank)
    key = _features(config.num_kv_heads, config.head_dim, rank)
    rows = Part(0, (query, _shifted(key, width), _shifted(key, width + key_width)))
    return {
        "attention.qkv.weight": rows,
        "attention.qkv.bias": rows,
        # norms over all heads (MPT-1B)
        "attention.query_norm.weight": Part(0, (query,)),
        "attention.query_norm.bias": Part(0, (query,)),
        "attention.key_norm.weight": Part(0, (key,)),
        "attention.key_norm.bias": Part(0, (key,)),
        "attention.output.weight": Part(1, (query,)),
    }


def _media_attention(config: GatedConfig, rank: Rank) -> dict[str, Part]:
    heads = _features(config.num_heads, config.head_dim, rank)
    return {
        "attention.query.weight": Part(0, (heads,)),
        "attention.key_value.weight": Part(0, (heads, _shifted(heads, config.num_heads * config.head_dim))),
        "attention.output.weight": Part(1, (heads,)),
    }


def _feed_forward(config: LanguageModelConfig | GatedConfig, rank: Rank) -> dict[str, Part]:
    hidden = rank.part_of(config.ffn_dim)
    rows = Part(0, (hidden, _shifted(hidden, config.ffn_dim)) if config.gated_ffn else (hidden,))
    return {
        "feed_forward.up.weight": rows,
        "feed_forward.up.bias": rows,
        "feed_forward.down.weight": Part(1, (hidden,)),
    }


def _features(num_heads: int, head_dim: int, rank: Rank) -> range:
    heads = rank.part_of(num_heads)
    return range(heads.start * head_dim, heads.stop * head_dim)


def _shifted(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by)
