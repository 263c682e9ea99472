"""Store each token's key and value in its block of the cache, in place; slot -1 (padding) is skipped."""

from __future__ import annotations

from torch import Tensor

from kernels.backend import jit_runtime, tl, triton, use_compiled, use_triton
from kernels.compiled import compiled, inlined
from kernels.configs import launch_config
from kernels.tiles import with_equal_strides


def kv_store_reference(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    block_size = kv_cache.shape[3]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            kv_cache[block, 0, :, offset] = key[row]
            kv_cache[block, 1, :, offset] = value[row]


@jit_runtime("slots")
def _store_token(
    key, value, kv_cache, slots, stride, block_stride, G: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    index = tl.arange(0, BLOCK)
    mask = index < G * K
    to = kv_cache + slot // B * block_stride + index // K * B * K + slot % B * K + index % K
    tl.store(to, tl.load(key + row * stride + index, mask=mask), mask=mask)
    tl.store(to + G * B * K, tl.load(value + row * stride + index, mask=mask), mask=mask)


def _launch(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    _, num_kv_heads, head_dim = key.shape
    key, value = with_equal_strides(key, value)
    _store_token[(len(key),)](
        key, value, kv_cache, slot_mapping, key.stride(0), kv_cache.stride(0), G=num_kv_heads, B=kv_cache.shape[3],
        K=head_dim, BLOCK=triton.next_power_of_2(num_kv_heads * head_dim),
        **launch_config("row", head_dim, key.dtype).options,
    )  # fmt: skip


@inlined
def store_token(key, value, kv_cache, key_at, value_at, target, num_heads, block_size, head_dim):
    """Copy one token's key from `key_at` and value from `value_at`; `target` is the offset of the key in the cache."""
    for head in range(num_heads):
        to = target + head * block_size * head_dim
        for i in range(head_dim):
            kv_cache[to + i] = key[key_at + head * head_dim + i]
            kv_cache[to + num_heads * block_size * head_dim + i] = value[value_at + head * head_dim + i]


@compiled("T* T* T* int64* int int int int int int")
def _store_rows(key, value, kv_cache, slots, num_tokens, stride, block_stride, num_heads, block_size, head_dim):
    for row in range(num_tokens):
        if slots[row] >= 0:
            target = slots[row] // block_size * block_stride + slots[row] % block_size * head_dim
            store_token(key, value, kv_cache, row * stride, row * stride, target, num_heads, block_size, head_dim)


def _store_compiled(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    num_tokens, num_heads, head_dim = key.shape
    key, value = with_equal_strides(key, value)
    _store_rows[key.dtype](
        key.data_ptr(), value.data_ptr(), kv_cache.data_ptr(), slot_mapping.data_ptr(), num_tokens, key.stride(0),
        kv_cache.stride(0), num_heads, kv_cache.shape[3], head_dim,
    )  # fmt: skip


def _store_in_torch(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    if bool((slot_mapping < 0).any()):
        real = slot_mapping >= 0
        key, value, slot_mapping = key[real], value[real], slot_mapping[real]
    block_size = kv_cache.shape[3]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    kv_cache[blocks, 0, :, offsets] = key
    kv_cache[blocks, 1, :, offsets] = value


def is_contiguous_in_blocks(kv_cache: Tensor) -> bool:
    """Return whether each block is contiguous, as in one layer's part of a cache; blocks may be apart."""
    _, _, num_heads, block_size, head_dim = kv_cache.shape
    inner = (num_heads * block_size * head_dim, block_size * head_dim, head_dim, 1)
    return kv_cache.stride()[1:] == inner


def kv_store(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store key, value [T, G, K] in kv_cache [N, 2, G, B, K]; slot_mapping [T] int64 holds block * B + offset."""
    if use_triton(key):
        _launch(key, value, kv_cache, slot_mapping)
    elif use_compiled(key, value) and is_contiguous_in_blocks(kv_cache):
        _store_compiled(key, value, kv_cache, slot_mapping)
    else:
        _store_in_torch(key, value, kv_cache, slot_mapping)
