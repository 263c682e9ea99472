"""Fuses rotation, the K/V store and paged attention of a decoding layer on a CPU into one call between two products."""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

from kernels.backend import use_compiled
from kernels.compiled import float32s, inlined, pointer_to_dtype
from kernels.paged_attention import paged_attention_reference
from kernels.paged_attention_loop import (
    TABLES,
    Cache,
    LoopRows,
    as_tensor,
    compile_loop,
    kernel_sizes,
    row_attention,
    row_tables,
)
from kernels.self_attention import kv_store, rotate_, rotate_heads, store_token
from kernels.threads import indices, run_on_threads, share, take, thread_functions, threaded, wait_until

# the arguments of the kernel: a counter of `wait_until`, addresses of tensors, sizes, and the next task
AT = indices(
    "counter qkv cos sin kv_cache out scale num_rows num_kv_heads block_size table_width qkv_stride block_stride rotary_dim"
    f" offset_dim {TABLES} task"
)
Arguments = ctypes.c_int64 * len(AT)


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


@inlined
def rotate_and_store_row(qkv, cos, sin, cache, rows, row, stride, group, head_dim, rotary_dim):
    """Rotate the queries and keys of a row, and store its keys and values in the last slot of the row."""
    at, last, size = row * stride, np.int64(rows.lengths[row]) - 1, cache.num_heads * head_dim
    rotate_heads(qkv, cos, sin, at, row * rotary_dim, (group + 1) * cache.num_heads, head_dim, rotary_dim)
    block, key = np.int64(rows.tables[row * rows.width + last // cache.block_size]), at + group * size
    target = block * cache.block_stride + last % cache.block_size * head_dim
    store_token(qkv, qkv, cache.elements, key, key + size, target, cache.num_heads, cache.block_size, head_dim)


@threaded
def _rotate_store_attend(dtype, head_dim, group, has_spans, has_offsets):
    attend_row, elements = row_attention(head_dim, group, has_spans, has_offsets), pointer_to_dtype(dtype)
    thread_number, count_threads = thread_functions()

    def rotate_store_attend(arguments):
        thread, num_threads = np.int64(thread_number()), np.int64(count_threads())
        qkv, cos, sin = elements(arguments[AT.qkv]), elements(arguments[AT.cos]), elements(arguments[AT.sin])
        out, scale, rotary_dim = elements(arguments[AT.out]), float32s(arguments[AT.scale]), arguments[AT.rotary_dim]
        num_rows, num_kv_heads, stride = arguments[AT.num_rows], arguments[AT.num_kv_heads], arguments[AT.qkv_stride]
        kv_cache, block_size = elements(arguments[AT.kv_cache]), arguments[AT.block_size]
        cache = Cache(kv_cache, num_kv_heads, block_size, arguments[AT.block_stride])
        rows = row_tables(arguments, AT.tables, arguments[AT.table_width], arguments[AT.offset_dim])
        first, end = share(num_rows, thread, num_threads)
        for row in range(first, end):
            rotate_and_store_row(qkv, cos, sin, cache, rows, row, stride, group, head_dim, rotary_dim)
        wait_until(arguments, num_threads)  # a row may read the keys of others
        task = take(arguments, AT.task)
        while task < num_rows * num_kv_heads:
            row, kv_head = task // num_kv_heads, task % num_kv_heads
            at, to, no_slopes = row * stride, row * num_kv_heads * group * head_dim, scale
            attend_row(qkv, cache, out, rows, no_slopes, scale[0], False, at, to, row, kv_head)
            task = take(arguments, AT.task)

    return rotate_store_attend


def compile_attention(kv_cache: Tensor, num_heads: int, *, has_offsets: bool, is_fused: bool) -> None:
    """Compile the loops for a cache [N, 2, G, B, K] and `num_heads` query heads: of plain sequences, and of spans.

    Otherwise a request would wait for seconds when a step first needs one. The binaries are stored, so this takes long only
    once per machine. `has_offsets`: spans may have keys with offsets. `is_fused`: layers call `decode_attention`, too.
    """
    if not use_compiled(kv_cache[:0]):
        return
    for has_spans in (False, True):
        sizes = kernel_sizes(kv_cache, num_heads, has_spans=has_spans, has_offsets=has_spans and has_offsets)
        compile_loop(sizes)
        if is_fused:
            _rotate_store_attend[sizes]


def decode_attention(qkv: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, plan: LoopRows, scale: float) -> Tensor:
    """Rotate and store the rows' keys and values, and attend: qkv [S, (H + 2 G) K], overwritten -> [S, H K].

    cos and sin [S, 1, rotary_dim]; kv_cache [N, 2, G, B, K], for which `plan` was built. The last slot of each row is that
    of its own token: the block table determines where its key is stored, before later rows read it. On a CPU, one call
    replaces three operators and the views between them.
    """
    num_rows, width = qkv.shape
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    sizes = kernel_sizes(kv_cache, num_heads, has_spans=plan.spans is not None, has_offsets=plan.offsets is not None)
    out = qkv.new_empty(num_rows, num_heads * head_dim)
    arguments = Arguments(
        0, qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), kv_cache.data_ptr(), out.data_ptr(), as_tensor(scale).data_ptr(),
        num_rows, num_kv_heads, block_size, plan.tables.shape[1], qkv.stride(0), kv_cache.stride(0), cos.shape[-1],
        plan.rotary_dim, *plan.addresses,
    )  # fmt: skip
    run_on_threads(_rotate_store_attend[sizes], arguments, plan.num_threads(num_heads))
    return out
