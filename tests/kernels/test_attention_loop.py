"""The compiled loop of paged attention: heads of any size, threads, and rows with NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import paged_attention_loop
from kernels.backend import runs_numba
from kernels.paged_attention import paged_attention_reference
from kernels.paged_attention_loop import LoopRows, attend_in_loop

pytestmark = pytest.mark.skipif(not runs_numba(), reason="Numba has no wheel for this platform")

LENGTHS, BLOCK_SIZE = [1, 4, 5, 37, 130], 4


def step_of(head_dim: int, group: int, num_kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, a cache, a table and lengths; slots after a row's own hold NaN."""
    torch.manual_seed(7)
    width = -(-max(LENGTHS) // BLOCK_SIZE)
    table = torch.randperm(len(LENGTHS) * width).view(len(LENGTHS), width)
    cache = torch.randn(table.numel(), 2, num_kv_heads, BLOCK_SIZE, head_dim)
    for blocks, length in zip(table.tolist(), LENGTHS, strict=True):
        for slot in range(length, width * BLOCK_SIZE):
            cache[blocks[slot // BLOCK_SIZE], :, :, slot % BLOCK_SIZE] = float("nan")
    query = torch.randn(len(LENGTHS), group * num_kv_heads, head_dim)
    return query.to(dtype), cache.to(dtype), table.int(), torch.tensor(LENGTHS).int()


def attend(query: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, slopes: Tensor | None = None) -> Tensor:
    rows = LoopRows(torch.arange(len(query)).int(), table.contiguous(), lengths.contiguous(), slopes)
    out = torch.full_like(query, float("nan"))
    attend_in_loop(query, cache, rows, 0.3, out)
    return out


# registers for the sums of all heads; for those of some heads, or of some parts of them; heads that are no whole vectors
@pytest.mark.parametrize("sizes", [(64, 3, 3), (128, 8, 1), (16, 32, 1), (80, 1, 2), (24, 2, 2), (6, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
def test_the_loop_equals_the_reference(sizes: tuple[int, int, int], dtype: torch.dtype, alibi: bool) -> None:
    query, cache, table, lengths = step_of(*sizes, dtype)
    slopes = torch.rand(query.shape[1]) if alibi else None
    starts = torch.arange(len(query) + 1)
    expected = paged_attention_reference(query, cache, table, starts, lengths, scale=0.3, alibi_slopes=slopes)
    torch.testing.assert_close(attend(query, cache, table, lengths, slopes), expected)


def test_a_row_depends_neither_on_its_batch_nor_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(64, 3, 3, torch.bfloat16)
    monkeypatch.setattr(paged_attention_loop, "MIN_THREADED_SCORES", 0)
    on_all_threads = attend(*step)
    monkeypatch.setattr(paged_attention_loop, "MIN_THREADED_SCORES", 1 << 30)
    assert torch.equal(attend(*step), on_all_threads)
    query, cache, table, lengths = step
    for row in range(len(query)):
        alone = slice(row, row + 1)
        assert torch.equal(attend(query[alone], cache, table[alone], lengths[alone]), on_all_threads[alone])


def test_a_nan_stays_in_its_row_and_large_scores_are_finite() -> None:
    query, cache, table, lengths = step_of(16, 2, 2, torch.float32)
    query[1] = float("nan")
    query[2] *= 1e30
    query[3] *= 1e4
    out = attend(query, cache, table, lengths)
    assert out[1].isnan().all()
    assert out[[0, 2, 3, 4]].isfinite().all()
