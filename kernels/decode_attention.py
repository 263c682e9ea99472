"""Self-attention of a decode step after the fused projection: rotation, store, and each row over its own blocks.

All rows are the last tokens of their sequences, so that the block table says where each key is stored. On a CPU it is one
call instead of three operators and the views between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.compiled import compiled_for, length
from kernels.kv_store import kv_store, store_token
from kernels.paged_attention import paged_attention
from kernels.paged_attention_cpu import DecodeRows, attend_row
from kernels.rotary import rotate_, rotate_heads


def decode_attention_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, plan: DecodeRows, scale: float
) -> Tensor:
    block_size, head_dim = kv_cache.shape[3:]
    num_kv_heads, last = kv_cache.shape[2], plan.lengths.long() - 1
    heads = qkv.unflatten(-1, (-1, head_dim))
    rotated = rotate_(heads[:, :-num_kv_heads].clone(), cos, sin)
    query, key = rotated[:, :-num_kv_heads], rotated[:, -num_kv_heads:]
    blocks = plan.tables.long().gather(1, (last // block_size)[:, None])[:, 0]
    kv_store(key, heads[:, -num_kv_heads:], kv_cache, blocks * block_size + last % block_size)
    starts = torch.arange(len(qkv) + 1, dtype=torch.int32)
    return paged_attention(query, kv_cache, plan.tables, starts, plan.lengths, scale=scale).flatten(1)


@compiled_for("T* T* T* T* T* int32* int32* float int int int int int int int int")
def _decode_rows(head_dim, group):
    def rotate_store_attend(
        qkv, cos, sin, kv_cache, out, tables, lengths, scale, num_sequences, num_kv_heads, block_size, table_width,
        qkv_stride, block_stride, rotary_dim, runtime_dim,
    ):  # fmt: skip
        width = length(kv_cache, head_dim, runtime_dim)
        size = num_kv_heads * width
        for row in range(num_sequences):
            at, table, last = row * qkv_stride, row * table_width, lengths[row] - 1
            rotate_heads(qkv, cos, sin, at, row * rotary_dim, (group + 1) * num_kv_heads, width, rotary_dim)
            target = tables[table + last // block_size] * block_stride + last % block_size * width
            key = at + group * size
            store_token(qkv, qkv, kv_cache, key, key + size, target, num_kv_heads, block_size, width)
            no_slopes = lengths  # never read
            attend_row(
                qkv, kv_cache, out, tables, no_slopes, scale, False, at, row * group * size, table, last + 1, num_kv_heads,
                block_size, block_stride, width, group,
            )  # fmt: skip

    return rotate_store_attend


def decode_attention(qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, plan: DecodeRows, scale: float) -> Tensor:
    """Rotate and store the rows' keys and values, and attend: qkv [S, (H + 2 G) K], overwritten -> [S, H K].

    cos and sin [S, 1, rotary_dim]; kv_cache [N, 2, G, B, K], for which `plan` was built.
    """
    num_sequences, width = qkv.shape
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    group = width // (num_kv_heads * head_dim) - 2
    out = qkv.new_empty(num_sequences, group * num_kv_heads * head_dim)
    _decode_rows[head_dim, group][qkv.dtype](
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), kv_cache.data_ptr(), out.data_ptr(), plan.tables.data_ptr(),
        plan.lengths.data_ptr(), scale, num_sequences, num_kv_heads, block_size, plan.tables.shape[1], qkv.stride(0),
        kv_cache.stride(0), cos.shape[-1], head_dim,
    )  # fmt: skip
    return out
