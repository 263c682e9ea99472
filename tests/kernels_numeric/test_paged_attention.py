"""Paged attention's kernel against its reference: prefill, decode and both at once, in parts and with shared blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import paged_plan as module
from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.paged_plan import TileShape, plan_tiles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Check = Callable[..., None]


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    shared: int = 0
    padding: int = 0

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Blocks in no order; those that a sequence does not use, and block 0, are NaN."""
        width = max(-(-context // self.block_size) for context in self.contexts) + 1
        num_sequences = len(self.contexts)
        shape = (num_sequences * width + 1, 2, self.kv_heads, self.block_size, self.head_dim)
        table = (torch.randperm(num_sequences * width) + 1).view(num_sequences, width).to(torch.int32)
        table[:, : self.shared] = table[0, : self.shared].clone()
        for row, context in zip(table, self.contexts, strict=True):
            row[-(-context // self.block_size) :] = 0
        kv_cache = torch.randn(shape).to(dtype)
        kv_cache[0] = float("nan")
        starts = torch.tensor((0, *self.queries)).cumsum(0).to(torch.int32)
        fused = torch.randn(int(starts[-1]) + self.padding, self.heads + 2 * self.kv_heads, self.head_dim).to(dtype)
        lengths = torch.tensor(self.contexts, dtype=torch.int32)
        return fused[:, : self.heads], kv_cache, table, starts, lengths


CASES = {
    "decode": Case(4, 4, 64, 16, (1, 1, 1), (3, 40, 65)),
    "decode_of_one": Case(9, 3, 64, 16, (1,), (129,)),
    "decode_grouped_by_3": Case(6, 2, 40, 4, (1, 1, 1), (9, 30, 70)),
    "decode_padded": Case(4, 2, 64, 16, (1, 1, 0, 0), (17, 40, 0, 0), padding=2),
    "prefill": Case(2, 2, 64, 16, (65, 1), (65, 1)),
    "prefill_behind_a_prefix": Case(3, 3, 16, 16, (5, 1, 33), (9, 30, 70)),
    "head_128": Case(2, 1, 128, 16, (3, 40), (60, 40)),
    "shared_decode": Case(6, 2, 40, 4, (1, 1, 1), (9, 30, 70), shared=2),
    "shared_prefill": Case(9, 3, 64, 16, (5, 1, 33), (29, 30, 70), shared=1),
}


def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], case: Case, slopes: Tensor | None) -> Tensor:
    return function(*inputs, scale=0.2, alibi_slopes=slopes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output(case: Case, alibi: bool, dtype: torch.dtype, close: Check) -> None:
    query, kv_cache, *rest = case.inputs(dtype)
    slopes = torch.rand(case.heads) if alibi else None
    out = run(paged_attention, (query, kv_cache, *rest), case, slopes)
    real = len(query) - case.padding
    expected = run(paged_attention_reference, (query[:real].float(), kv_cache.float(), *rest), case, slopes)
    close("out", out[:real], expected)
    assert not out[real:].any()


@pytest.mark.parametrize("shared", [0, 5, 8, 16], ids="shared_{}".format)
@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
def test_a_long_context_is_cut_into_parts(
    shared: int, alibi: bool, close: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPLIT", 64)
    case = Case(4, 2, 32, 8, (1, 1, 1), (129, 200, 320), shared=shared)
    inputs = case.inputs(torch.float32)
    slopes = torch.rand(4) if alibi else None
    close("out", run(paged_attention, inputs, case, slopes), run(paged_attention_reference, inputs, case, slopes))


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy, for the other row
def test_a_decoding_row_is_the_same_in_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row decodes alone, or with a longer sequence of NaN in a wider table and more parts."""
    monkeypatch.setattr(module, "SPLIT", 64)
    case = Case(4, 2, 32, 8, (1, 1), (50, 300))
    query, kv_cache, table, starts, lengths = case.inputs(torch.float32)
    kv_cache[table[1].long()] = float("nan")
    query[1] = float("nan")
    alone = paged_attention(query[:1], kv_cache, table[:1, :7], starts[:2], lengths[:1], scale=0.2)
    both = paged_attention(query, kv_cache, table, starts, lengths, scale=0.2)
    assert torch.equal(both[0], alone[0])
    assert both[1].isnan().all()


def test_tokens_after_a_row_are_not_read() -> None:
    case = CASES["prefill_behind_a_prefix"]
    query, kv_cache, table, starts, lengths = case.inputs(torch.float32)
    before = paged_attention(query, kv_cache, table, starts, lengths, scale=0.2)
    assert not before.isnan().any()
    kv_cache[table[0, 0], :, :, 9:] = float("nan")  # after the 9 tokens of the first sequence, in its block
    assert torch.equal(paged_attention(query, kv_cache, table, starts, lengths, scale=0.2), before)


def test_blocks_beyond_the_reach_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    stride = 2**30 + 64
    small = torch.randn(3, 2, 1, 16, 16).half()
    kv_cache = torch.empty(2 * stride + 512, dtype=torch.float16).as_strided(small.shape, (stride, 256, 256, 16, 1))
    for block in range(3):
        kv_cache[block] = small[block]
    table, starts = torch.tensor([[2, 1]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    rest = (table, starts, torch.tensor([30], dtype=torch.int32))
    query = torch.randn(1, 1, 16).half()
    assert torch.equal(
        paged_attention(query, kv_cache, *rest, scale=0.2), paged_attention(query, small, *rest, scale=0.2)
    )


def test_an_unreadable_cache_is_refused() -> None:
    query, kv_cache, *rest = CASES["decode"].inputs(torch.float32)
    with pytest.raises(ValueError, match="within a block"):
        paged_attention(query, kv_cache.transpose(2, 3), *rest, scale=0.2)
    with pytest.raises(ValueError, match="block size of 12, the kernel requires a power of two"):
        paged_attention(query, kv_cache[:, :, :, :12].contiguous(), *rest, scale=0.2)
    with pytest.raises(ValueError, match="32 query heads per key head do not fit into a tile of 16"):
        plan_tiles(*rest, num_tokens=3, shape=TileShape(16, 32, 64, torch.float32))
