"""Write each token's key and value into its block of the cache, in place; slot -1 (padding) is skipped."""

from __future__ import annotations

from torch import Tensor


def kv_store_reference(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    block_size = kv_cache.shape[3]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, block_size)
            kv_cache[block, 0, :, offset] = key[row]
            kv_cache[block, 1, :, offset] = value[row]


def kv_store(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """key, value [T, G, K]; kv_cache [N, 2, G, B, K]; slot_mapping [T] int64, block * B + offset."""
    if len(slot_mapping) <= 4:  # decode: two plain copies a token cost less than the index machinery
        return kv_store_reference(key, value, kv_cache, slot_mapping)
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    block_size = kv_cache.shape[3]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    kv_cache[blocks, 0, :, offsets] = key
    kv_cache[blocks, 1, :, offsets] = value
    return None
