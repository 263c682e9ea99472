"""The caches are zeros at aligned addresses, and take memory only when they are written."""

from __future__ import annotations

import mmap
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.batch import KVCache, MediaPages
from tests.tiny_models import CONFIGS

CONFIG = CONFIGS["flamingo"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caches_are_aligned_zeros(dtype: torch.dtype) -> None:
    lm, gated = CONFIG.language_model, CONFIG.gated
    blocks = KVCache.zeros(CONFIG, 6, 4, dtype, "cpu").blocks
    pages = MediaPages.zeros(CONFIG, 3, dtype, "cpu").pages
    assert blocks.shape == (lm.num_layers, 6, 2, lm.num_kv_heads, 4, lm.head_dim)
    assert pages.shape[0] == 3
    assert pages.shape[-1] == gated.head_dim
    for cache in (blocks, pages):
        assert cache.dtype == dtype
        assert cache.is_contiguous()
        assert cache.data_ptr() % mmap.PAGESIZE == 0
        assert not cache.any()
        cache[-1] = 1
        assert cache.float().sum() == cache[-1].numel()


@pytest.mark.skipif(sys.platform != "linux", reason="the memory in use is read from /proc")
def test_a_cache_takes_memory_when_it_is_written() -> None:
    config = replace(CONFIG, language_model=replace(CONFIG.language_model, num_layers=1))
    num_bytes = 256 * 2**20
    num_blocks = num_bytes // KVCache.zeros(config, 1, 4, torch.float32, "cpu").blocks.nbytes
    before = resident_bytes()
    cache = KVCache.zeros(config, num_blocks, 4, torch.float32, "cpu")
    assert resident_bytes() - before < num_bytes / 8
    cache.blocks.fill_(1)
    assert resident_bytes() - before > num_bytes / 2


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024
