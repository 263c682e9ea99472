"""Tests that the variants of the benchmark agree with the reference of media attention, apart from their timing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.backend import BackendError
from kernels.bench.variants import early_loads, multiply_add
from kernels.media_attention import media_attention_reference
from kernels.media_attention_gpu import media_tiles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTERPRETED = {"early_loads": early_loads, "multiply_add": multiply_add}
Check = Callable[..., None]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

# slots, heads, keys per page, head size
SHAPES = {
    "decode": ([4, -1, 2], 2, 64, 64),
    "tiles": ([-1] * 3 + [5] * 18 + [0] * 2, 2, 64, 64),
    "odd": ([-1, 5, 5, 0, 2], 3, 24, 40),
    "head_128": ([0, 0, 3], 1, 64, 128),
}


def pool(heads: int, keys: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return the second of two layers of a pool of six pages, a view with its own page stride."""
    return torch.randn(6, 2, heads, 2, keys, head_dim).to(dtype)[:, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("attend", INTERPRETED.values(), ids=INTERPRETED.keys())
def test_output(attend: Attend, shape: tuple[list[int], int, int, int], dtype: torch.dtype, close: Check) -> None:
    rows, heads, keys, head_dim = shape
    slots, kv = torch.tensor(rows, dtype=torch.int32), pool(heads, keys, head_dim, dtype)
    query = torch.randn(len(rows), heads, 2 * head_dim).to(dtype)[..., :head_dim].contiguous()
    actual = attend(query, kv, slots, media_tiles(slots, head_dim, dtype), 0.3)
    close("out", actual, media_attention_reference(query.float(), kv.float(), slots, scale=0.3))
    assert not actual[slots < 0].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # from numpy, for the token without a page
@pytest.mark.parametrize("attend", INTERPRETED.values(), ids=INTERPRETED.keys())
def test_empty_tiles_and_unread_pages_do_not_affect_the_result(attend: Attend) -> None:
    slots, kv = torch.tensor([2, -1, 1], dtype=torch.int32), pool(2, 64, 64, torch.float32)
    query = torch.randn(3, 2, 64)
    tiles = media_tiles(slots, 64, torch.float32)
    expected = attend(query, kv, slots, tiles, 0.3)
    kv[[0, 3, 4, 5]] = float("nan")
    query[1] = float("nan")  # a token without a page
    padded = torch.zeros(6, 4, dtype=torch.int32)
    padded[[1, 2, 5]] = tiles
    assert torch.equal(attend(query, kv, slots, padded, 0.3), expected)


def test_an_unsupported_call_raises() -> None:
    slots, kv, query = torch.zeros(1, dtype=torch.int32), torch.randn(1, 2, 2, 64, 64), torch.randn(1, 2, 64)
    tiles = media_tiles(slots, 64, torch.float32)
    with pytest.raises(BackendError, match="sm_90 or later, got interpreter"):
        partial(early_loads, pdl=True)(query, kv, slots, tiles, 0.3)
    with pytest.raises(BackendError, match="only on a GPU"):
        multiply_add(query, kv, slots, None, 0.3)
    with pytest.raises(ValueError, match="one page per token, got 2"):
        multiply_add(query, kv, torch.zeros(1, 2, dtype=torch.int32), tiles, 0.3)
