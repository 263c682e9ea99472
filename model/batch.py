"""The inputs of one forward pass: packed tokens, keys and values of text in blocks, and those of media in pages.

A batch holds tokens of any mix of sequences, with no padding. Example: one sequence prefills five tokens, another decodes
its 8th. Then token_ids has T = 6 entries, query_starts is [0, 5, 6], context_lengths is [5, 8], and each row of block_table
lists the blocks with the keys and values of one sequence. The engine decides which block or page holds what, and when.

A sequence's context may also be a list of spans, which are computed independently of each other and at any positions. A
span is a run of blocks, of which the last may be partly filled. `block_positions` and `block_lengths` then say which tokens
each block holds, and a token reads a key if and only if the key is valid and its position is at most the token's own. The
last span is the sequence's own: its slots end with the tokens of this step. Keys may have been computed at other positions
than those at which the sequence sees them; `block_offsets` has the differences.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from kernels.paged_attention_cpu import GatherPlan
from kernels.paged_plan import TilePlan
from model.config import AlonePositions, FlamingoConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, of each token; in a plain sequence, its index
    # [T] int32, the media page that each token reads or -1; [T, J] for "all previous images"; None if no token reads one
    media_slot: Tensor | None
    media_plan: Tensor | None = None  # how a GPU reads the pages, by `plan_media`; None: the forward makes it
    query_starts: Tensor  # [S + 1] int32, first row of each sequence
    last_token: Tensor  # [W] int64, the rows whose logits are requested

    # fields of a forward with a K/V cache

    # [S] int32, number of slots in each row of block_table up to the last token of this step, where all blocks but the last
    # count as full; in a plain sequence, its number of tokens
    context_lengths: Tensor | None = None
    block_table: Tensor | None = None  # [S, B] int32
    # [S, B] int32, the position of each block's first token, and its number of valid tokens: 0 where there is no block (the
    # last block of a sequence's own span may count as full); None: all are plain, block w starts at w * block_size
    block_positions: Tensor | None = None
    block_lengths: Tensor | None = None
    # [S, B] int32, the positions at which the row sees a block's keys, minus those to which they were rotated; None: all 0
    block_offsets: Tensor | None = None
    slot_mapping: Tensor | None = None  # [T] int64, block * block_size + offset of each token's keys and values
    # how the cache is read, by `LanguageModel.plan`; None: the forward makes it
    plan: TilePlan | GatherPlan | None = None

    # fields of a forward without a cache

    # [T] int32, the span of each token in sequences whose shots attend alone. A token reads earlier tokens of its own span
    # and of span 0; in a query (-1, -2, ...) also those of the shots (1, 2, ...). None: all 0
    spans: Tensor | None = None
    span_offsets: Tensor | None = None  # [T], position at which queries see each token, minus its own. None: all 0

    @property
    def seen_positions(self) -> Tensor:
        """The positions [T] at which queries see the tokens of whole sequences."""
        return self.positions if self.span_offsets is None else self.positions + self.span_offsets

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the batch, including those of a GPU's plan, in the order that `with_tensors` expects."""
        tables = [table for name in TABLES if (table := getattr(self, name)) is not None]
        return [*tables, *(self.plan.tables if isinstance(self.plan, TilePlan) else [])]

    def with_tensors(self, tensors: Iterable[Tensor]) -> Batch:
        """Return the batch with other tensors in place of its own, such as copies of them on a device."""
        remaining = iter(tensors)
        names = [name for name in TABLES if getattr(self, name) is not None]
        tables: dict[str, Any] = {name: next(remaining) for name in names}
        batch = replace(self, **tables)
        return replace(batch, plan=self.plan.with_tables(remaining)) if isinstance(self.plan, TilePlan) else batch


TABLES = tuple(field.name for field in fields(Batch) if field.name != "plan")


def whole_sequences(
    token_ids: Sequence[Sequence[int]],
    media_slot: Sequence[Sequence[int] | Sequence[Sequence[int]]],
    device: torch.device | str = "cpu",
    spans: Sequence[Sequence[int]] = (),
    alone_positions: AlonePositions = "restart",
) -> Batch:
    """Return a batch of whole sequences, for a forward without a cache that gives the logits of every token.

    `spans` is needed if shots of any sequence attend alone: the span of each token, and where queries see the shots.
    """
    lengths = torch.tensor([0] + [len(ids) for ids in token_ids])
    starts = lengths.cumsum(0)
    positions = [span_positions(of, alone_positions) for of in spans or ([0] * len(ids) for ids in token_ids)]
    offsets = [offset for of in spans for offset in span_offsets(of)] if alone_positions == "in_a_row" else []
    return Batch(
        token_ids=torch.tensor([t for ids in token_ids for t in ids], device=device),
        positions=torch.tensor([position for of in positions for position in of], device=device),
        media_slot=torch.tensor([s for slots in media_slot for s in slots], dtype=torch.int32, device=device),
        query_starts=starts.to(torch.int32).to(device),
        last_token=torch.arange(int(starts[-1]), device=device),
        spans=torch.tensor([s for of in spans for s in of], dtype=torch.int32, device=device) if spans else None,
        span_offsets=torch.tensor(offsets, device=device) if offsets else None,
    )


def span_positions(spans: Sequence[int], alone_positions: AlonePositions) -> list[int]:
    """Return the position of each token of a sequence.

    Shots follow span 0; queries follow the longest shot or, if they see shots in a row, the last one.
    """
    lengths = Counter(spans)
    shots = [count for span, count in lengths.items() if span > 0]
    prefix, after = lengths[0], sum(shots) if alone_positions == "in_a_row" else max(shots, default=0)
    num_seen = Counter[int]()
    positions = []
    for span in spans:
        origin = 0 if span == 0 else prefix if span > 0 else prefix + after
        positions.append(origin + num_seen[span])
        num_seen[span] += 1
    return positions


def span_offsets(spans: Sequence[int]) -> list[int]:
    """Return, for queries that see shots in a row, the position at which they see each token, minus its own."""
    lengths = Counter(span for span in spans if span > 0)  # in the order of the shots
    first = dict(zip(lengths, accumulate(lengths.values(), initial=0), strict=False))
    return [first.get(span, 0) for span in spans]


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of text for all layers: [L, N, 2, G, B, K], N blocks of B tokens."""

    blocks: Tensor
    _layers: tuple[Tensor, ...] = field(init=False, repr=False)  # views, created once

    def __post_init__(self) -> None:
        object.__setattr__(self, "_layers", self.blocks.unbind(0))

    @classmethod
    def zeros(
        cls, config: FlamingoConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        lm = config.language_model
        shape = (lm.num_layers, num_blocks, 2, lm.num_kv_heads, block_size, lm.head_dim)
        return cls(_zeros(shape, dtype, device))

    def layer(self, index: int) -> Tensor:
        return self._layers[index]  # [N, 2, G, B, K]


class NoCache:
    """Replaces the K/V cache where there is none: every layer attends to the batch's own tokens."""

    def layer(self, index: int) -> Tensor | None:
        return None


NO_CACHE = NoCache()


@dataclass(frozen=True, slots=True)
class MediaPages:
    """Keys and values of media for all gated layers: [M, X, H, 2, R, K], one contiguous slab per media item.

    Training and the reference project them anew for each forward; the engine keeps them.
    """

    pages: Tensor
    gated_layers: tuple[int, ...]  # the language-model layers that have a gated layer before them
    _layers: dict[int, Tensor] = field(init=False, repr=False)  # views, created once

    def __post_init__(self) -> None:
        object.__setattr__(self, "_layers", dict(zip(self.gated_layers, self.pages.unbind(1), strict=True)))

    @classmethod
    def zeros(
        cls, config: FlamingoConfig, num_pages: int, dtype: torch.dtype, device: torch.device | str
    ) -> MediaPages:
        gated, layers = config.gated, config.gated_layers
        shape = (num_pages, len(layers), gated.num_heads, 2, config.resampler.num_latents, gated.head_dim)
        return cls(_zeros(shape, dtype, device), layers)

    def layer(self, index: int) -> Tensor:
        return self._layers[index]  # [M, H, 2, R, K]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return zeros; on a CPU, the system allocates their memory when it is first written.

    A cache of gigabytes would otherwise be written at startup, and freed page by page when its process is killed. Memory
    from numpy would be allocated in huge pages, for which the first request would wait.
    """
    if torch.device(device).type != "cpu" or not prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
