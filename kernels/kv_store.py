# mypy: disable-error-code="no-untyped-def"
"""Write each token's key and value into its block of the cache, in place; slot -1 (padding) is skipped."""

from __future__ import annotations

from torch import Tensor

from kernels.backend import jit_runtime, tl, triton, use_triton
from kernels.configs import launch_config


def kv_store_reference(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    block_size = kv_cache.shape[3]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            kv_cache[block, 0, :, offset] = key[row]
            kv_cache[block, 1, :, offset] = value[row]


@jit_runtime("slots")
def _store_token(
    key,
    value,
    kv_cache,
    slots,
    stride,
    block_stride,
    G: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    index = tl.arange(0, BLOCK)
    real = index < G * K
    to = kv_cache + slot // B * block_stride + index // K * B * K + slot % B * K + index % K
    tl.store(to, tl.load(key + row * stride + index, mask=real), mask=real)
    tl.store(to + G * B * K, tl.load(value + row * stride + index, mask=real), mask=real)


def _launch(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    _, num_kv_heads, head_dim = key.shape
    inner = (head_dim, 1)
    if key.stride() != value.stride() or key.stride()[1:] != inner:
        key, value = key.contiguous(), value.contiguous()
    _store_token[(len(key),)](
        key, value, kv_cache, slot_mapping, key.stride(0), kv_cache.stride(0), G=num_kv_heads, B=kv_cache.shape[3],
        K=head_dim, BLOCK=triton.next_power_of_2(num_kv_heads * head_dim),
        **launch_config("row", head_dim, key.dtype).options,
    )  # fmt: skip


def _store_in_torch(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    block_size = kv_cache.shape[3]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    kv_cache[blocks, 0, :, offsets] = key
    kv_cache[blocks, 1, :, offsets] = value


def kv_store(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """key, value [T, G, K]; kv_cache [N, 2, G, B, K]; slot_mapping [T] int64, block * B + offset."""
    if use_triton(key):
        _launch(key, value, kv_cache, slot_mapping)
    elif len(slot_mapping) <= 4:  # decode: two plain copies a token cost less than the index machinery
        kv_store_reference(key, value, kv_cache, slot_mapping)
    else:
        _store_in_torch(key, value, kv_cache, slot_mapping)
