"""A Llama-like decoder layer for steps of few rows on a CPU, in one call that runs on all of torch's threads.

The threads compute one part of the layer after the other, each a share of it, and wait for each other in between. With one
call per part, OpenMP's threads wait for the next call in a loop of `pause` instructions. On a virtual machine, a product
after such a wait is slower: a hypervisor may suspend a processor that only waits.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.compiled import bfloat16s, exp, float32s, inlined, int64s, load, store
from kernels.decode_attention import decode_attention, rotate_and_store_row
from kernels.integer_product import (
    ENTRY,
    OFFSETS,
    IntegerWeights,
    integer_product,
    multiply_share,
    quantise,
    quantise_group,
)
from kernels.integer_tile import GROUP, GROUP_BYTES, KNOWN
from kernels.paged_attention_loop import TABLES, Cache, LoopRows, row_attention, row_tables
from kernels.rows import add_rms_norm, norm_row, rms_norm, swiglu
from kernels.threads import indices, run_on_threads, share, take, thread_functions, threaded, wait_until

# the arguments of the kernel: a counter of `wait_until`, addresses of tensors, sizes, and the next task of attention
AT = indices(
    "counter layout x out scratch num_rows kv_cache num_kv_heads block_size block_stride table_width cos sin rotary_dim"
    f" {TABLES} task"
)
Arguments = ctypes.c_int64 * len(AT)
# where the layouts of the matrices begin in that of a layer, and after them the addresses of two norms and of three numbers
QKV, OUTPUT, GATE_UP, DOWN, NORMS = range(0, 5 * len(ENTRY), len(ENTRY))


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of a layer: matrices with one number of bits, norms [D] in float32, and three numbers in float32."""

    qkv: IntegerWeights  # [(H + 2 G) K, D]
    output: IntegerWeights  # [D, H K]
    gate_up: IntegerWeights  # [2 F, D]
    down: IntegerWeights  # [D, F]
    attention_norm: Tensor
    ffn_norm: Tensor
    numbers: Tensor  # epsilon of the two norms, and the scale of the scores

    # looked up once: what the kernel reads of a layer, and the scratch that it needs per row
    layout: Tensor = field(init=False, repr=False)
    scratch_bytes: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        matrices = self.qkv, self.output, self.gate_up, self.down
        tensors = self.attention_norm, self.ffn_norm, self.numbers
        layout = [
            *(entry for matrix in matrices for entry in matrix.layout),
            *(tensor.data_ptr() for tensor in tensors),
        ]
        # the parts of the kernel's scratch: outputs of products, a norm and what is attended, and a quantised input
        num_groups = layout[QKV + ENTRY.num_groups] + layout[OUTPUT + ENTRY.num_groups]
        num_numbers = sum(matrix.num_features for matrix in matrices) + GROUP * num_groups
        object.__setattr__(self, "layout", torch.tensor(layout))
        object.__setattr__(self, "scratch_bytes", 2 * num_numbers + max(matrix.row_bytes for matrix in matrices))


def decoder_layer_reference(
    x: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, plan: LoopRows, weights: LayerWeights
) -> Tensor:
    attention_eps, ffn_eps, scale = weights.numbers.tolist()
    qkv = integer_product(rms_norm(x, weights.attention_norm, attention_eps), weights.qkv)
    attended = integer_product(decode_attention(qkv, cos, sin, kv_cache, plan, scale), weights.output)
    h, normed = add_rms_norm(x, attended, weights.ffn_norm, ffn_eps)
    return h + integer_product(swiglu(integer_product(normed, weights.gate_up)), weights.down)


class Scratch(NamedTuple):
    """The addresses of the parts of the kernel's scratch: rows quantised in groups, and rows in bfloat16."""

    groups: int
    normed: int
    qkv: int
    attended: int
    branch: int
    total: int
    gate_up: int


@inlined
def scratch_parts(begin, num_rows, num_groups, dim, qkv_dim, heads_dim):
    normed = begin + num_rows * num_groups * GROUP_BYTES
    qkv = normed + 2 * num_rows * dim
    attended = qkv + 2 * num_rows * qkv_dim
    branch = attended + 2 * num_rows * heads_dim
    total = branch + 2 * num_rows * dim
    return Scratch(begin, normed, qkv, attended, branch, total, total + 2 * num_rows * dim)


@inlined
def norm_rows(x, weight, normed, groups, first_row, end_row, dim, eps, offset):
    """Normalise rows, and quantise the results."""
    for row in range(first_row, end_row):
        norm_row(x, weight, normed, row * dim, dim, eps)
    quantise(normed, groups, first_row * dim // GROUP, end_row * dim // GROUP, offset)


@inlined
def quantise_swiglu(gate_up, groups, first, end, width, offset):
    """Quantise groups of silu(gate) * up of rows [gate; up]; the gates are overwritten."""
    for group in range(first, end):
        row, column = group * GROUP // width, group * GROUP % width
        gate, up = 2 * row * width + column, (2 * row + 1) * width + column
        for i in range(GROUP):
            value = load(gate_up, gate + i)
            store(gate_up, gate + i, value / (np.float32(1) + exp(-value)) * load(gate_up, up + i))
        quantise_group(gate_up, gate, groups + group * GROUP_BYTES, offset)


# the n-th call of `wait_until` waits for n times the number of threads
@threaded
def _decoder_layer(bits, instructions, head_dim, group, has_spans, has_offsets):
    known, offset = KNOWN[instructions], OFFSETS[bits]
    multiply, lanes = multiply_share(known, bits), known.lanes
    thread_number, count_threads = thread_functions()
    attend_row = row_attention(head_dim, group, has_spans, has_offsets)

    def decoder_layer(arguments):
        thread, num_threads = np.int64(thread_number()), np.int64(count_threads())
        layout, x, out = int64s(arguments[AT.layout]), bfloat16s(arguments[AT.x]), bfloat16s(arguments[AT.out])
        cos, sin, rotary_dim = bfloat16s(arguments[AT.cos]), bfloat16s(arguments[AT.sin]), arguments[AT.rotary_dim]
        num_rows, num_kv_heads = arguments[AT.num_rows], arguments[AT.num_kv_heads]
        kv_cache, block_size = bfloat16s(arguments[AT.kv_cache]), arguments[AT.block_size]
        cache = Cache(kv_cache, num_kv_heads, block_size, arguments[AT.block_stride])
        rows = row_tables(arguments, AT.tables, arguments[AT.table_width], rotary_dim)
        attention_norm, ffn_norm = float32s(layout[NORMS]), float32s(layout[NORMS + 1])
        numbers = float32s(layout[NORMS + 2])
        dim_groups, head_groups = layout[QKV + ENTRY.num_groups], layout[OUTPUT + ENTRY.num_groups]
        ffn_groups = layout[DOWN + ENTRY.num_groups]
        dim, heads_dim, ffn_dim = dim_groups * GROUP, head_groups * GROUP, ffn_groups * GROUP
        qkv_dim, num_groups = heads_dim + 2 * num_kv_heads * head_dim, max(dim_groups, head_groups, ffn_groups)
        parts = scratch_parts(arguments[AT.scratch], num_rows, num_groups, dim, qkv_dim, heads_dim)
        groups, normed, qkv = parts.groups, bfloat16s(parts.normed), bfloat16s(parts.qkv)
        attended, branch = bfloat16s(parts.attended), bfloat16s(parts.branch)
        total, gate_up = bfloat16s(parts.total), bfloat16s(parts.gate_up)
        first_row, end_row = share(num_rows, thread, num_threads)

        norm_rows(x, attention_norm, normed, groups, first_row, end_row, dim, numbers[0], offset)
        wait_until(arguments, num_threads)
        multiply(layout, QKV, groups, parts.qkv, num_rows, thread, num_threads)
        wait_until(arguments, 2 * num_threads)

        for row in range(first_row, end_row):
            rotate_and_store_row(qkv, cos, sin, cache, rows, row, qkv_dim, group, head_dim, rotary_dim)
        wait_until(arguments, 3 * num_threads)
        task = take(arguments, AT.task)
        while task < num_rows * num_kv_heads:
            row, kv_head = task // num_kv_heads, task % num_kv_heads
            at, to, no_slopes = row * qkv_dim, row * heads_dim, numbers
            attend_row(qkv, cache, attended, rows, no_slopes, numbers[2], False, at, to, row, kv_head)
            task = take(arguments, AT.task)
        wait_until(arguments, 4 * num_threads)
        first, end = share(num_rows * head_groups, thread, num_threads)
        quantise(attended, groups, first, end, offset)
        wait_until(arguments, 5 * num_threads)
        multiply(layout, OUTPUT, groups, parts.branch, num_rows, thread, num_threads)
        wait_until(arguments, 6 * num_threads)

        for i in range(first_row * dim, end_row * dim):
            store(total, i, load(x, i) + load(branch, i))
        norm_rows(total, ffn_norm, normed, groups, first_row, end_row, dim, numbers[1], offset)
        wait_until(arguments, 7 * num_threads)
        multiply(layout, GATE_UP, groups, parts.gate_up, num_rows, thread, num_threads)
        wait_until(arguments, 8 * num_threads)
        first, end = share(num_rows * ffn_groups, thread, num_threads)
        quantise_swiglu(gate_up, groups, first, end, ffn_dim, offset)
        wait_until(arguments, 9 * num_threads)
        multiply(layout, DOWN, groups, parts.branch, num_rows, thread, num_threads)
        first, end = share(layout[DOWN + ENTRY.num_tiles], thread, num_threads)
        for row in range(num_rows):  # no wait: a thread adds the features that it has computed
            for i in range(row * dim + first * lanes, row * dim + end * lanes):
                store(out, i, load(total, i) + load(branch, i))

    return decoder_layer


def decoder_layer(
    x: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, plan: LoopRows, weights: LayerWeights
) -> Tensor:
    """Compute a layer, and store the rows' keys and values: x [S, D] bfloat16 -> [S, D].

    The other arguments are those of `decode_attention`.
    """
    (num_rows, dim), (_, _, num_kv_heads, block_size, head_dim) = x.shape, kv_cache.shape
    kernel = _kernel(weights.qkv, head_dim, num_kv_heads, plan.spans is not None, plan.offsets is not None)
    x = x.contiguous()
    out, scratch = x.new_empty(num_rows, dim), torch.empty(num_rows * weights.scratch_bytes, dtype=torch.uint8)
    arguments = Arguments(
        0, weights.layout.data_ptr(), x.data_ptr(), out.data_ptr(), scratch.data_ptr(), num_rows, kv_cache.data_ptr(),
        num_kv_heads, block_size, kv_cache.stride(0), plan.tables.shape[1], cos.data_ptr(), sin.data_ptr(), cos.shape[-1],
        *plan.addresses,
    )  # fmt: skip
    run_on_threads(kernel, arguments)
    return out


def compile_layer(weights: LayerWeights, kv_cache: Tensor, *, has_offsets: bool) -> None:
    """Compile the kernel of a layer, of plain sequences and of spans, which may have keys with offsets."""
    _, _, num_kv_heads, _, head_dim = kv_cache.shape
    for has_spans in (False, True):
        _kernel(weights.qkv, head_dim, num_kv_heads, has_spans, has_spans and has_offsets)


def _kernel(qkv: IntegerWeights, head_dim: int, num_kv_heads: int, has_spans: bool, has_offsets: bool) -> int:
    group = qkv.num_features // (num_kv_heads * head_dim) - 2
    return _decoder_layer[qkv.bits, KNOWN.index(qkv.instructions), head_dim, group, has_spans, has_offsets]
