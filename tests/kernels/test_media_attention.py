"""The reference of media attention against its definition, and attention by runs, which serves a CPU, against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.backend import select
from kernels.media_attention import media_attention, media_attention_reference, plan_media, quantise_pages

PATTERNS = {
    "decode": [2],
    "no_page": [-1],
    "prefill": [-1] * 5 + [0] * 33 + [3] * 16 + [1] * 9,
    "many_short_runs": [-1, 0, 1, 2, 3, 0, -1, 2],
    "groups_without_gaps": [0, 1, 2, 3, 0, 2],
    "nothing": [-1] * 3,
    "no_rows": [],
}
ALL_PREVIOUS = [[-1, -1], [0, -1], [0, -1], [0, 3], [0, 3], [-1, 2], [1, 1]]


@pytest.fixture(autouse=True)
def in_torch() -> Iterator[None]:
    torch.manual_seed(3)
    select("reference")
    yield
    select("auto")


def pool(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 2, 3, 2, 8, 16).to(dtype)[:, 1]  # [M, H, 2, R, K], one layer of two


def slots_of(rows: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_a_token_reads_its_page_and_no_other() -> None:
    kv, query = pool(), torch.randn(2, 3, 16)
    out = media_attention_reference(query, kv, slots_of([2, -1]), scale=0.25)
    weights = torch.einsum("hk,hrk->hr", query[0] * 0.25, kv[2, :, 0]).softmax(-1)
    torch.testing.assert_close(out[0], torch.einsum("hr,hrk->hk", weights, kv[2, :, 1]))
    assert torch.equal(out[1], torch.zeros(3, 16))


def test_all_previous_media_share_one_softmax() -> None:
    kv, query = pool(), torch.randn(2, 3, 16)
    out = media_attention_reference(query, kv, slots_of([[-1, 3, 1], [-1, -1, -1]]), scale=0.25)
    keys, values = (torch.cat([kv[3, :, i], kv[1, :, i]], 1) for i in (0, 1))
    weights = torch.einsum("hk,hrk->hr", query[0] * 0.25, keys).softmax(-1)
    torch.testing.assert_close(out[0], torch.einsum("hr,hrk->hk", weights, values))
    assert torch.equal(out[1], torch.zeros(3, 16))


@pytest.mark.parametrize("rows", [*PATTERNS.values(), ALL_PREVIOUS], ids=[*PATTERNS, "all_previous"])
def test_attention_by_runs_equals_the_reference(rows: list[int]) -> None:
    kv, query, weight = pool(), torch.randn(len(rows), 3, 16), torch.rand(16)
    out = media_attention(query, kv, slots_of(rows), scale=0.25, query_norm=weight, query_norm_eps=1e-3)
    expected = media_attention_reference(query, kv, slots_of(rows), scale=0.25, query_norm=weight, query_norm_eps=1e-3)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("rows", [PATTERNS["prefill"], PATTERNS["many_short_runs"], ALL_PREVIOUS], ids=str)
def test_gradients_by_runs_equal_the_reference(rows: list[int]) -> None:
    kv, query = pool(), torch.randn(len(rows), 3, 16)
    upstream = torch.randn(query.shape)
    results = []
    functions: list[Callable[..., Tensor]] = [media_attention, media_attention_reference]
    for function in functions:
        leaves = [query.clone().requires_grad_(), kv.clone().requires_grad_()]
        results.append(torch.autograd.grad(function(*leaves, slots_of(rows), scale=0.25), leaves, upstream))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", PATTERNS.values(), ids=PATTERNS.keys())
def test_an_unread_page_may_hold_anything(rows: list[int]) -> None:
    kv, query = pool(), torch.randn(len(rows), 3, 16)
    before = media_attention(query, kv, slots_of(rows), scale=0.25)
    kv[[page for page in range(4) if page not in rows]] = float("nan")
    assert torch.equal(media_attention(query, kv, slots_of(rows), scale=0.25), before)


@pytest.mark.parametrize("rows", PATTERNS.values(), ids=PATTERNS.keys())
def test_bfloat16_stays_bfloat16(rows: list[int]) -> None:
    kv, query = pool(torch.bfloat16), torch.randn(len(rows), 3, 16).bfloat16()
    out = media_attention(query, kv, slots_of(rows), scale=0.25)
    assert out.dtype == torch.bfloat16
    expected = media_attention_reference(query.float(), kv.float(), slots_of(rows), scale=0.25)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("trains", [False, True], ids=["serves", "trains"])
@pytest.mark.parametrize("rows", [*PATTERNS.values(), ALL_PREVIOUS], ids=[*PATTERNS, "all_previous"])
def test_one_plan_serves_all_layers(rows: list[int], trains: bool) -> None:
    plan = plan_media(torch.empty(0), slots_of(rows), 16)
    for _ in range(2):
        kv, query = pool(), torch.randn(len(rows), 3, 16, requires_grad=trains)
        planned = media_attention(query, kv, slots_of(rows), scale=0.25, plan=plan)
        assert torch.equal(planned, media_attention(query, kv, slots_of(rows), scale=0.25))


def test_there_is_no_plan_where_no_token_reads_a_page() -> None:
    assert plan_media(torch.empty(0), None, 16) is None


def test_pages_of_8_bits_are_close_to_the_originals() -> None:
    kv, query = pool(), torch.randn(4, 3, 16)
    pages, scales = quantise_pages(kv)
    out = media_attention(query, pages, slots_of([0, 1, 2, -1]), scale=0.25, media_scale=scales)
    expected = media_attention(query, kv, slots_of([0, 1, 2, -1]), scale=0.25)
    assert pages.dtype == torch.int8
    assert (out - expected).norm() / expected.norm() < 1.5e-2
