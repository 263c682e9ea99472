"""The compiled loop of paged attention: heads of any size, threads, and rows with NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import kernels.threads
from kernels import paged_attention_loop
from kernels.backend import runs_numba
from kernels.compiled import OnDemand
from kernels.decode_attention import decode_attention
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


@pytest.fixture(params=[2, 5])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(paged_attention_loop, "MIN_THREADED_SCORES", 0)
    yield
    torch.set_num_threads(before)


def on_one_thread(attend: Callable[[], Tensor]) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention_loop, "MIN_THREADED_SCORES", 1 << 30)
        return attend()


@pytest.mark.usefixtures("threads")
def test_a_row_depends_neither_on_its_batch_nor_on_the_threads() -> None:
    query, cache, table, lengths = step_of(64, 3, 3, torch.bfloat16)
    on_all_threads = attend(query, cache, table, lengths)
    assert torch.equal(on_one_thread(lambda: attend(query, cache, table, lengths)), on_all_threads)
    for row in range(len(query)):
        alone = slice(row, row + 1)
        assert torch.equal(attend(query[alone], cache, table[alone], lengths[alone]), on_all_threads[alone])


@pytest.mark.usefixtures("threads")
def test_tokens_of_one_sequence_read_the_keys_that_other_threads_store() -> None:
    torch.manual_seed(9)
    num_rows, num_heads, num_kv_heads, head_dim = 12, 6, 2, 16
    table = torch.randperm(5).int().repeat(num_rows, 1)
    rows = LoopRows(torch.arange(num_rows).int(), table, torch.arange(6, 6 + num_rows).int(), None)
    qkv, angles = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim), torch.rand(num_rows, 1, head_dim)
    cache = torch.randn(5, 2, num_kv_heads, BLOCK_SIZE, head_dim)

    def run() -> Tensor:
        return decode_attention(qkv.clone(), angles.cos(), angles.sin(), cache.clone(), rows, 0.3)

    expected = on_one_thread(run)
    for _ in range(50):
        assert torch.equal(run(), expected)


def test_a_nan_stays_in_its_row_and_large_scores_are_right() -> None:
    query, cache, table, lengths = step_of(16, 2, 2, torch.float32)
    query[1] = float("nan")
    query[2] *= 1e30
    query[3] *= 30  # e^88 is infinite in float32; larger scores would be rounded by more than the tolerance
    keys = cache[:, 0].nan_to_num().flatten(0, 2)
    assert (0.3 * query[3] @ keys.T).max() > 88
    out = attend(query, cache, table, lengths)
    assert out[1].isnan().all()
    starts = torch.arange(len(query) + 1)
    expected = paged_attention_reference(query, cache, table, starts, lengths, scale=0.3)
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_few_scores_are_computed_by_one_thread() -> None:
    table = torch.zeros(1, 64).int()

    def num_threads(num_slots: int) -> int | None:
        return LoopRows(torch.zeros(1).int(), table, torch.tensor([num_slots]).int(), None).num_threads(num_heads=4)

    assert (num_threads(255), num_threads(256)) == (1, None)


def test_without_an_openmp_runtime_one_thread_computes_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    query, cache, table, lengths = step_of(64, 3, 3, torch.float32)
    monkeypatch.setattr(paged_attention_loop, "MIN_THREADED_SCORES", 0)
    expected = attend(query, cache, table, lengths)
    sizes = paged_attention_loop.kernel_sizes(cache, 9, has_spans=False, has_offsets=False)
    address = paged_attention_loop._attend_rows[sizes]
    monkeypatch.setattr(kernels.threads, "_openmp", lambda: None)
    monkeypatch.setattr(paged_attention_loop, "_attend_rows", OnDemand(paged_attention_loop._attend_rows._build))
    assert torch.equal(attend(query, cache, table, lengths), expected)
    assert paged_attention_loop._attend_rows[sizes] != address, "a binary for threads"
