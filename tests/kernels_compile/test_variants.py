"""Tests of the compiled variants of the benchmark: no spills, and all loads of a page before the wait of PDL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.backend import BackendError
from kernels.bench.variants import VARIANTS, early_loads

HEADS = {64: 8, 128: 32}
PDL_TARGETS = ["sm_90", "sm_100"]


def launch(variant: Callable[..., object], head_dim: int) -> None:
    heads = HEADS[head_dim]
    pages = torch.empty((1 << 31) // (heads * 4 * 64 * head_dim) + 2, heads, 2, 64, head_dim, dtype=torch.bfloat16)
    query, slots = torch.empty(64, heads, head_dim, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int32)
    variant(query, pages, slots, torch.zeros(64, 4, dtype=torch.int32), 0.1)


def page_loads(head_dim: int) -> int:
    """Return the number of 16-byte loads per thread for the K and V of one head."""
    return 2 * 64 * head_dim * 2 // (16 * 128)


@pytest.mark.parametrize("target", PDL_TARGETS)
@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_well(name: str, head_dim: int, target: str, compile_for: Callable[..., list[Any]]) -> None:
    [kernel] = compile_for(target, lambda: launch(VARIANTS[name], head_dim))
    print(kernel)
    assert kernel.spills == 0
    assert kernel.wide_copies >= page_loads(head_dim)
    assert (kernel.tensor_core == 0) == (name == "variant, FMA")


@pytest.mark.parametrize("target", PDL_TARGETS)
@pytest.mark.parametrize("head_dim", HEADS)
def test_a_page_is_requested_before_the_wait_for_the_preceding_kernel(
    head_dim: int, target: str, compile_for: Callable[..., list[Any]]
) -> None:
    """All of K and V and nothing else is loaded before the wait; the query, which the preceding kernel writes, after it."""
    [kernel] = compile_for(target, lambda: launch(VARIANTS["variant, no loop, PDL"], head_dim))
    assert kernel.waits == 1
    assert kernel.copies_before_wait == page_loads(head_dim)
    assert kernel.wide_copies > page_loads(head_dim)
    [plain] = compile_for(target, lambda: launch(early_loads, head_dim))
    assert plain.waits == 0


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_an_older_gpu_raises(target: str, compile_for: Callable[..., list[Any]]) -> None:
    with pytest.raises(BackendError, match="sm_90 or later"):
        compile_for(target, lambda: launch(VARIANTS["variant, no loop, PDL"], 64))
