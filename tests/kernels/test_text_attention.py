"""Causal and paged attention in torch: against their definition, against each other, and with shared blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels import paged_attention_cpu
from kernels.backend import select
from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.paged_attention_cpu import gather_plan
from kernels.self_attention import causal_attention, causal_attention_reference, kv_store

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 6, 2, 16, 4


@pytest.fixture(autouse=True)
def in_torch() -> Iterator[None]:
    torch.manual_seed(4)
    select("reference")
    yield
    select("auto")


def starts_of(*lengths: int) -> Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


def slopes_if(alibi: bool) -> Tensor | None:
    return torch.rand(HEADS) if alibi else None


def packed(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    key, value = torch.randn(2, num_tokens, KV_HEADS, HEAD_DIM)
    return torch.randn(num_tokens, HEADS, HEAD_DIM), key, value


@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
def test_the_reference_equals_the_definition(alibi: bool) -> None:
    query, key, value = packed(5)
    slopes = slopes_if(alibi)
    out = causal_attention_reference(query, key, value, starts_of(2, 3), scale=0.3, alibi_slopes=slopes)
    row, head, first = 4, 5, 2  # the last row of the second sequence; its head reads the second key head
    scores = (key[first:, 1] @ query[row, head]) * 0.3
    if slopes is not None:
        scores = scores - slopes[head] * torch.tensor([2.0, 1.0, 0.0])
    torch.testing.assert_close(out[row, head], scores.softmax(0) @ value[first:, 1])


@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
def test_causal_attention_and_its_gradients_equal_the_reference(alibi: bool) -> None:
    inputs, starts, slopes = packed(13), starts_of(1, 7, 0, 5), slopes_if(alibi)
    upstream = torch.randn(13, HEADS, HEAD_DIM)
    results = []
    functions: list[Callable[..., Tensor]] = [causal_attention, causal_attention_reference]
    for function in functions:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves, starts, scale=0.3, alibi_slopes=slopes)
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def scattered(key: Tensor, value: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Store whole sequences in blocks in random order; the rest of the cache is NaN."""
    width = max(-(-length // BLOCK_SIZE) for length in lengths)
    table = torch.randperm(len(lengths) * width).view(len(lengths), width)
    kv_cache = torch.full((len(lengths) * width, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM), float("nan"))
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    kv_store(key, value, kv_cache, table[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
    return kv_cache, table.to(torch.int32)


@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
@pytest.mark.parametrize("function", [paged_attention, paged_attention_reference], ids=["serving", "reference"])
@pytest.mark.parametrize("queries", [(1, 1, 1), (9, 5, 14), (3, 1, 8)], ids=["decode", "whole", "mixed"])
def test_the_cache_changes_nothing(queries: tuple[int, ...], function: Callable[..., Tensor], alibi: bool) -> None:
    lengths, slopes = [9, 5, 14], slopes_if(alibi)
    query, key, value = packed(sum(lengths))
    whole = causal_attention_reference(query, key, value, starts_of(*lengths), scale=0.3, alibi_slopes=slopes)
    kv_cache, table = scattered(key, value, lengths)
    ends = starts_of(*lengths)[1:].tolist()
    last = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, queries, strict=True)])
    out = function(
        query[last], kv_cache, table, starts_of(*queries), torch.tensor(lengths), scale=0.3, alibi_slopes=slopes
    )
    torch.testing.assert_close(out, whole[last])


@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
@pytest.mark.parametrize("queries", [(1, 1, 1), (3, 0, 6)], ids=["decode", "mixed"])
def test_a_shared_prefix_is_read_once_and_changes_nothing(queries: tuple[int, ...], alibi: bool) -> None:
    lengths, slopes = torch.tensor([11, 9, 14]), slopes_if(alibi)
    table = torch.tensor([[1, 2, 3, 0], [1, 2, 4, 0], [1, 2, 5, 6]], dtype=torch.int32)
    kv_cache = torch.randn(7, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    query = torch.randn(sum(queries), HEADS, HEAD_DIM)
    inputs = (query, kv_cache, table, starts_of(*queries), lengths)
    got = paged_attention(*inputs, scale=0.3, alibi_slopes=slopes)
    torch.testing.assert_close(got, paged_attention_reference(*inputs, scale=0.3, alibi_slopes=slopes))


@pytest.mark.parametrize("lengths", [(7, 8), (8, 8), (9, 16)])
def test_blocks_that_decoding_sequences_share_are_found(lengths: tuple[int, int]) -> None:
    table = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]], dtype=torch.int32)
    kv_cache = torch.randn(7, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    plan = gather_plan(kv_cache, table, starts_of(1, 1), torch.tensor(lengths), num_heads=HEADS)
    product = plan.gathered
    assert product is not None
    assert len(product.shared) == min(2, (min(lengths) - 1) // BLOCK_SIZE)
    inputs = (torch.randn(2, HEADS, HEAD_DIM), kv_cache, table, starts_of(1, 1), torch.tensor(lengths))
    got = paged_attention(*inputs, scale=0.3, plan=plan)
    torch.testing.assert_close(got, paged_attention_reference(*inputs, scale=0.3))


@pytest.mark.parametrize("has_bfloat16", [False, True])
@pytest.mark.parametrize("num_shared", [0, 2])
def test_products_of_bfloat16_are_in_float32_on_a_processor_without_it(
    num_shared: int, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_attention_cpu, "has_bfloat16", lambda: has_bfloat16)
    lengths, first = torch.tensor([11, 14]), [1, 2][:num_shared]
    rest = [[3, 0, 1, 2], [4, 5, 6, 0]]
    table = torch.tensor([[*first, *blocks][:4] for blocks in rest], dtype=torch.int32)
    kv_cache = torch.randn(7, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM).bfloat16()
    query = torch.randn(2, HEADS, HEAD_DIM).bfloat16()
    plan = gather_plan(kv_cache, table, starts_of(1, 1), lengths, num_heads=HEADS)
    assert plan.gathered is not None
    assert plan.gathered.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    inputs = (query, kv_cache, table, starts_of(1, 1), lengths)
    got = paged_attention(*inputs, scale=0.3, plan=plan)
    assert got.dtype == torch.bfloat16
    wide = (query.float(), kv_cache.float(), *inputs[2:])
    error = (got.float() - paged_attention_reference(*wide, scale=0.3)).abs().max()
    assert error < (2e-2 if has_bfloat16 else 2**-8), "of numbers up to 2, rounded once"


@pytest.mark.parametrize("num_tokens", [3, 9], ids=["decode", "prefill"])
def test_kv_store_fills_the_mapped_slots_and_skips_padding(num_tokens: int) -> None:
    kv_cache = torch.zeros(5, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    key, value = torch.randn(2, num_tokens, KV_HEADS, HEAD_DIM)
    slots = torch.randperm(5 * BLOCK_SIZE)[:num_tokens]
    slots[1] = -1
    kv_store(key, value, kv_cache, slots)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, BLOCK_SIZE)
            assert torch.equal(kv_cache[block, :, :, offset], torch.stack([key[row], value[row]]))
    assert int(kv_cache.abs().sum((1, 2, 4)).count_nonzero()) == num_tokens - 1
