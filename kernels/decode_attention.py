"""Fuses rotation, the K/V store and paged attention of a decoding layer on a CPU into one call between two products."""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

from kernels.backend import use_compiled
from kernels.compiled import float32s, int32s, pointer_to_dtype
from kernels.paged_attention import paged_attention_reference
from kernels.paged_attention_loop import LoopRows, as_tensor, compile_loop, kernel_sizes, row_attention
from kernels.self_attention import kv_store, rotate_, rotate_heads, store_token
from kernels.threads import run_on_threads, share, take, thread_functions, threaded, wait_until

Arguments = ctypes.c_int64 * 24
TASKS = 23  # the index of the next task


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


# arguments: a counter of `wait_until`; addresses of qkv, cosines, sines, the cache, the output and the scale; the number of
# rows, key heads, the block size, the width of the tables, the strides of a row and of a block, the widths of angles and of
# offsets' angles; the addresses of `LoopRows`; the next task
@threaded
def _rotate_store_attend(dtype, head_dim, group, has_spans, has_offsets):
    attend_row, elements = row_attention(head_dim, group, has_spans, has_offsets), pointer_to_dtype(dtype)
    thread_number, count_threads = thread_functions()

    def rotate_store_attend(arguments):
        thread, num_threads = np.int64(thread_number()), np.int64(count_threads())
        qkv, cos, sin = elements(arguments[1]), elements(arguments[2]), elements(arguments[3])
        kv_cache, out, scale = elements(arguments[4]), elements(arguments[5]), float32s(arguments[6])
        num_rows, num_kv_heads, block_size, table_width = arguments[7], arguments[8], arguments[9], arguments[10]
        qkv_stride, block_stride, rotary_dim = arguments[11], arguments[12], arguments[13]
        tables, lengths = int32s(arguments[15]), int32s(arguments[16])
        size = num_kv_heads * head_dim
        first, end = share(num_rows, thread, num_threads)
        for row in range(first, end):
            at, last = row * qkv_stride, np.int64(lengths[row]) - 1
            rotate_heads(qkv, cos, sin, at, row * rotary_dim, (group + 1) * num_kv_heads, head_dim, rotary_dim)
            block, key = np.int64(tables[row * table_width + last // block_size]), at + group * size
            target = block * block_stride + last % block_size * head_dim
            store_token(qkv, qkv, kv_cache, key, key + size, target, num_kv_heads, block_size, head_dim)
        wait_until(arguments, num_threads)  # a row may read the keys of others
        task = take(arguments, TASKS)
        while task < num_rows * num_kv_heads:
            row, kv_head = task // num_kv_heads, task % num_kv_heads
            no_slopes = scale  # never read
            attend_row(
                qkv, kv_cache, out, tables, int32s(arguments[17]), int32s(arguments[18]), int32s(arguments[19]),
                int32s(arguments[20]), float32s(arguments[21]), float32s(arguments[22]), no_slopes, scale[0], False,
                row * qkv_stride, row * group * size, row, table_width, np.int64(lengths[row]), kv_head, num_kv_heads,
                block_size, block_stride, arguments[14],
            )  # fmt: skip
            task = take(arguments, TASKS)

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
