"""Greedy decoding of logits: each row's most likely token, and whether the row is finite.

The compiled loop reads the logits in their own dtype, where torch's operators copy them to float32 and read them twice.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.backend import use_compiled
from kernels.compiled import compiled, inlined, load, store


def greedy_argmax_reference(logits: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    # a row's maximum is NaN where any of its logits is
    is_finite = logits.amax(-1).isfinite()
    return logits.index_fill(1, excluded, -torch.inf).argmax(-1), is_finite


@inlined
def ordered_bits(value):
    """Return a float32 as an int32 that compares like it; without NaN's exceptions, loops over them become vectors."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@inlined
def largest(logits, first, width):
    top = np.int32(-(2**31))
    for i in range(first, first + width):
        top = max(top, ordered_bits(load(logits, i)))
    return top


@inlined
def index_of(top, logits, first, width):
    index = np.int32(width)
    for i in range(width):
        candidate = np.int32(i) if ordered_bits(load(logits, first + i)) == top else np.int32(width)
        index = min(index, candidate)
    return index


@compiled("T* int64* int64* int64* int int int int")
def _greedy_rows(logits, excluded, token_ids, is_finite, num_rows, stride, width, num_excluded):
    infinite = np.int32(0x7F800000)
    lowest = np.int32(infinite ^ np.int32(-1))  # minus infinity as ordered bits
    for row in range(num_rows):
        first = row * stride
        size = np.int32(0)  # the largest magnitude; that of a NaN is larger than infinity's
        for i in range(first, first + width):
            size = max(size, np.int32(np.float32(load(logits, i)).view(np.int32) & np.int32(0x7FFFFFFF)))
        top = largest(logits, first, width)
        is_finite[row] = size <= infinite and lowest < top < infinite
        for i in range(num_excluded):
            store(logits, first + excluded[i], np.float32(-np.inf))
        token_ids[row] = index_of(largest(logits, first, width), logits, first, width)


def greedy_argmax(logits: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token ids [S] and whether each row is finite.

    logits [S, V] are overwritten; excluded [E] int64 are ids that are never chosen.
    """
    if not use_compiled(logits[:1]) or logits.stride(1) != 1:
        return greedy_argmax_reference(logits, excluded)
    num_rows, width = logits.shape
    token_ids, is_finite = torch.empty(2, num_rows, dtype=torch.int64)
    _greedy_rows[logits.dtype](
        logits.data_ptr(), excluded.data_ptr(), token_ids.data_ptr(), is_finite.data_ptr(), num_rows, logits.stride(0),
        width, len(excluded),
    )  # fmt: skip
    return token_ids, is_finite.bool()
