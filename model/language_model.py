"""The frozen decoder: one class for Llama, GPT-NeoX, MPT, OPT and a Chinchilla-like preset, which differ by configuration.

Tokens are packed [T, D]; the batch has the lengths. Each layer gets its part of the K/V cache as an argument; `None` means
that tokens attend only to the batch (training, the reference).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.paged_attention import paged_attention, plan_step
from kernels.paged_attention_cpu import GatherPlan
from kernels.paged_attention_loop import LoopRows
from kernels.paged_plan import TilePlan
from kernels.self_attention import (
    causal_attention,
    rotary_angles,
    rotate_,
    rotate_and_store,
    rotate_reference,
)
from kernels.spans import Offsets, Spans
from model.batch import Batch
from model.config import LanguageModelConfig
from model.layers import FeedForward, TokenTable, make_norm
from model.ranks import ALONE, Rank


class StepContext(NamedTuple):
    """A batch, and the values that all layers of its forward share: rotary angles or ALiBi slopes, and a plan."""

    batch: Batch
    cos: Tensor | None = None  # [T, 1, rotary_dim]
    sin: Tensor | None = None
    alibi_slopes: Tensor | None = None  # [H] float32
    # without a cache: cos and sin that rotate keys to the positions at which queries see them
    seen_angles: tuple[Tensor, Tensor] | None = None
    plan: TilePlan | GatherPlan | None = None  # how the K/V cache is read
    decoding: LoopRows | None = None  # if the compiled loop computes all rows, each as one that decodes


class SelfAttention(nn.Module):
    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.num_heads = [config.num_heads, config.num_kv_heads]
        self.query_key_widths = [query, key]
        self.widths = [query + key, key]
        self.qkv = nn.Linear(config.dim, query + 2 * key, bias=config.qkv_bias)
        self.output = nn.Linear(query, config.dim, bias=config.output_bias)
        self.query_norm = make_norm(config.norm, query, config.norm_eps, config.norm_bias) if config.qk_norm else None
        self.key_norm = make_norm(config.norm, key, config.norm_eps, config.norm_bias) if config.qk_norm else None

    def forward(self, x: Tensor, context: StepContext, kv: Tensor | None) -> Tensor:
        attended = self._attend(x, context) if kv is None else self._attend_cached(x, context, kv)  # [T, H, K]
        return self.output(attended.flatten(-2))

    def project(self, x: Tensor, context: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [T, D] to queries [T, H, K], keys and values [T, G, K], rotated to their positions."""
        heads, value = self._heads(x)
        if context.cos is not None and context.sin is not None:
            heads = rotate_(heads, context.cos, context.sin)
        query, key = heads.split_with_sizes(self.num_heads, dim=1)
        return query, key, value

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project x [T, D] to queries and keys [T, H + G, K], before rotation, and values [T, G, K]."""
        query_key, value = self.qkv(x).split_with_sizes(self.widths, dim=-1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = query_key.split(self.query_key_widths, dim=-1)
            query_key = torch.cat([self.query_norm(query), self.key_norm(key)], dim=-1)
        return query_key.unflatten(-1, (-1, self.head_dim)), value.unflatten(-1, (-1, self.head_dim))

    def _attend(self, x: Tensor, context: StepContext) -> Tensor:
        batch = context.batch
        query, key, value = self.project(x, context)
        seen_key = None if context.seen_angles is None else rotate_reference(key, *context.seen_angles)
        return causal_attention(
            query, key, value, batch.query_starts,
            scale=self.head_dim**-0.5, alibi_slopes=context.alibi_slopes, positions=batch.positions, spans=batch.spans,
            seen_positions=batch.seen_positions, seen_key=seen_key,
        )  # fmt: skip

    def _attend_cached(self, x: Tensor, context: StepContext, kv: Tensor) -> Tensor:
        batch = context.batch
        assert batch.slot_mapping is not None
        assert batch.block_table is not None
        assert batch.context_lengths is not None
        heads, value = self._heads(x)
        query = rotate_and_store(heads, value, context.cos, context.sin, kv, batch.slot_mapping)
        return paged_attention(
            query,
            kv,
            batch.block_table,
            batch.query_starts,
            batch.context_lengths,
            scale=self.head_dim**-0.5,
            alibi_slopes=context.alibi_slopes,
            plan=context.plan,
        )


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, one after the other or in parallel."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.attention_norm = make_norm(config.norm, config.dim, config.norm_eps, config.norm_bias)
        self.attention = SelfAttention(config)
        self.ffn_norm = make_norm(config.norm, config.dim, config.norm_eps, config.norm_bias)
        self.feed_forward = FeedForward(
            config.dim, config.ffn_dim, config.activation, gated=config.gated_ffn, bias=config.ffn_bias
        )

    def forward(self, x: Tensor, context: StepContext, kv: Tensor | None) -> Tensor:
        attended = self.attention(self.attention_norm(x), context, kv)
        if self.parallel:
            return self.feed_forward.added_to(x + attended, self.ffn_norm(x))
        h, normed = self.ffn_norm.of_sum(x, attended)
        return self.feed_forward.added_to(h, normed)


class LanguageModel(nn.Module):
    """The parts of the decoder, which `model.flamingo.Flamingo.forward` runs with gated layers in between."""

    def __init__(self, config: LanguageModelConfig, rank: Rank = ALONE) -> None:
        super().__init__()
        self.config = config
        self.rank = rank
        self.embed = TokenTable(config.vocab_size, config.num_new_tokens, config.dim)
        learned = config.position == "learned"
        self.positions = nn.Embedding(config.max_positions + config.position_offset, config.dim) if learned else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = make_norm(config.norm, config.dim, config.norm_eps, config.norm_bias)
        self.head = None if config.tied_head else TokenTable(config.vocab_size, config.num_new_tokens, config.dim)

    def embed_tokens(self, batch: Batch) -> Tensor:  # -> [T, D]
        x = self.embed(batch.token_ids)
        if self.positions is not None:
            x = x + self.positions(batch.positions + self.config.position_offset)
        return x

    def step_context(self, batch: Batch, dtype: torch.dtype, kv: Tensor | None = None) -> StepContext:
        """Compute the values that all layers share; `kv` is any layer's part of the K/V cache, if there is one."""
        config, cos, sin, slopes, seen_angles = self.config, None, None, None, None
        if config.position == "rotary":
            cos, sin = self._angles(batch.positions, dtype)
            seen_angles = None if batch.span_offsets is None else self._angles(batch.span_offsets, dtype)
        elif config.position == "alibi":
            slopes = self._slopes(batch.positions.device)
        plan, spans = batch.plan, self.spans(batch)
        if kv is not None and plan is None:
            plan = self.plan(batch, kv, slopes)
        elif kv is not None and isinstance(plan, TilePlan) and batch.block_table is not None:
            plan = plan.over(batch.block_table, kv.shape[3], spans)
        decoding = plan.only_loop(len(batch.token_ids)) if isinstance(plan, GatherPlan) else None
        return StepContext(batch, cos, sin, slopes, seen_angles, plan, decoding)

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_angles(positions, self.config.rotary_dim, self.config.rope_theta)
        return cos.to(dtype), sin.to(dtype)

    def spans(self, batch: Batch) -> Spans | None:
        """Return the positions of a batch's queries and blocks, or None if all its sequences are plain."""
        if batch.block_positions is None or batch.block_lengths is None:
            return None
        offsets = None
        if batch.block_offsets is not None and self.config.position == "rotary":
            config = self.config
            offsets = Offsets.of(batch.block_offsets, config.rotary_dim, config.rope_theta, config.max_positions)
        return Spans(batch.positions, batch.block_positions, batch.block_lengths, offsets)

    def _slopes(self, device: torch.device) -> Tensor:
        """Return the ALiBi slopes of the heads that are computed here."""
        num_heads = self.config.num_heads
        heads = self.rank.part_of(num_heads * self.rank.size)
        return alibi_slopes(num_heads * self.rank.size, self.config.alibi_bias_max, device)[heads.start : heads.stop]

    def plan(self, batch: Batch, kv: Tensor, slopes: Tensor | None = None) -> TilePlan | GatherPlan:
        """Return how all layers read their parts of the K/V cache; `kv` is the part of any layer."""
        assert batch.block_table is not None
        assert batch.context_lengths is not None
        return plan_step(
            kv,
            batch.block_table,
            batch.query_starts,
            batch.context_lengths,
            num_tokens=len(batch.token_ids),
            num_heads=self.config.num_heads,
            alibi_slopes=slopes,
            spans=self.spans(batch),
        )

    def logits(self, x: Tensor) -> Tensor:  # [W, D] -> [W, V + A]
        table = self.embed if self.head is None else self.head
        return table.logits(self.norm(x))

    def logits_of(self, x: Tensor, token_ids: Tensor) -> Tensor:  # [W, D], [N] -> [W, N]
        table = self.embed if self.head is None else self.head
        return self.norm(x) @ table(token_ids).to(x.dtype).T


def alibi_slopes(num_heads: int, bias_max: int, device: torch.device) -> Tensor:
    """Return 2^(-bias_max h / H) for head h of H (Press et al., 2022).

    If the number of heads is not a power of two, the slopes are every second one of the next power, then those between
    (MPT's order).
    """
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = torch.exp2(-torch.arange(1, power + 1, dtype=torch.float32, device=device) * (bias_max / power))
    if power != num_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes
