"""Fuses rotation, the K/V store and paged attention of a decoding layer on a CPU into one call between two products."""

from __future__ import annotations

from torch import Tensor

from kernels.backend import use_compiled
from kernels.compiled import compiled_for, length
from kernels.paged_attention import paged_attention_reference
from kernels.paged_attention_loop import LoopRows, attend_row, compile_loop
from kernels.self_attention import kv_store, rotate_, rotate_heads, store_token


def decode_attention_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, plan: LoopRows, scale: float
) -> Tensor:
    block_size, head_dim = kv_cache.shape[3:]
    num_kv_heads, last = kv_cache.shape[2], plan.lengths.long() - 1
    heads = qkv.unflatten(-1, (-1, head_dim))
    rotated = rotate_(heads[:, :-num_kv_heads].clone(), cos, sin)
    query, key = rotated[:, :-num_kv_heads], rotated[:, -num_kv_heads:]
    blocks = plan.tables.long().gather(1, (last // block_size)[:, None])[:, 0]
    kv_store(key, heads[:, -num_kv_heads:], kv_cache, blocks * block_size + last % block_size)
    starts = plan.lengths.new_ones(len(qkv) + 1).cumsum(0) - 1
    rest = (plan.tables, starts, plan.lengths)
    return paged_attention_reference(query, kv_cache, *rest, scale=scale, spans=plan.spans).flatten(1)


@compiled_for(
    "T* T* T* T* T* int32* int32* int32* int32* int32* int32* float32* float32* float int int int int int int int int"
)
def _rotate_store_attend(head_dim, group, has_spans, has_offsets):
    def rotate_store_attend(
        qkv, cos, sin, kv_cache, out, tables, lengths, positions, block_positions, block_lengths, block_offsets, offset_cos,
        offset_sin, scale, num_sequences, num_kv_heads, block_size, table_width, qkv_stride, block_stride, rotary_dim,
        runtime_dim,
    ):  # fmt: skip
        width = length(kv_cache, head_dim, runtime_dim)
        size = num_kv_heads * width
        for row in range(num_sequences):
            at, last = row * qkv_stride, lengths[row] - 1
            rotate_heads(qkv, cos, sin, at, row * rotary_dim, (group + 1) * num_kv_heads, width, rotary_dim)
            block = tables[row * table_width + last // block_size]
            target = block * block_stride + last % block_size * width
            key = at + group * size
            store_token(qkv, qkv, kv_cache, key, key + size, target, num_kv_heads, block_size, width)
            no_slopes = lengths  # never read
            attend_row(
                qkv, kv_cache, out, tables, positions, block_positions, block_lengths, block_offsets, offset_cos,
                offset_sin, no_slopes, scale, has_spans, has_offsets, False, at, row * group * size, row, table_width,
                last + 1, 0, num_kv_heads, num_kv_heads, block_size, block_stride, width, rotary_dim, group,
            )  # fmt: skip

    return rotate_store_attend


def compile_attention(kv_cache: Tensor, num_heads: int, *, has_offsets: bool, is_fused: bool) -> None:
    """Compile the loops for a cache [N, 2, G, B, K] and `num_heads` query heads: of plain sequences, and of spans.

    Otherwise a request would wait for seconds when a step first needs one. The binaries are stored, so this takes long only
    once per machine. `has_offsets`: spans may have keys with offsets. `is_fused`: layers call `decode_attention`, too.
    """
    if not use_compiled(kv_cache[:0]):
        return
    _, _, num_kv_heads, _, head_dim = kv_cache.shape
    for has_spans in (False, True):
        sizes = head_dim, num_heads // num_kv_heads, has_spans, has_spans and has_offsets
        compile_loop(sizes, kv_cache.dtype)
        if is_fused:
            _rotate_store_attend[sizes][kv_cache.dtype]


def decode_attention(qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, plan: LoopRows, scale: float) -> Tensor:
    """Rotate and store the rows' keys and values, and attend: qkv [S, (H + 2 G) K], overwritten -> [S, H K].

    cos and sin [S, 1, rotary_dim]; kv_cache [N, 2, G, B, K], for which `plan` was built. The last slot of each row is that
    of its own token: the block table determines where its key is stored, before later rows read it. On a CPU, one call
    replaces three operators and the views between them.
    """
    num_sequences, width = qkv.shape
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    group = width // (num_kv_heads * head_dim) - 2
    out = qkv.new_empty(num_sequences, group * num_kv_heads * head_dim)
    _rotate_store_attend[head_dim, group, plan.spans is not None, plan.offsets is not None][qkv.dtype](
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), kv_cache.data_ptr(), out.data_ptr(), *plan.addresses,
        scale, num_sequences, num_kv_heads, block_size, plan.tables.shape[1], qkv.stride(0),
        kv_cache.stride(0), cos.shape[-1], head_dim,
    )  # fmt: skip
    return out
