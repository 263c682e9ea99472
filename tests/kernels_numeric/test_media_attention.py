"""The media attention kernels against their reference: outputs, every gradient, and that a row's result is its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import media_attention_gpu as module
from kernels.media_attention import media_attention, media_attention_reference, quantise_pages
from kernels.media_attention_gpu import media_tiles
from kernels.tiles import tile_records

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Check = Callable[..., None]

# slots, heads, keys a page, head size
SHAPES = {
    "decode": ([2], 2, 64, 64),
    "decode_of_three": ([4, -1, 2], 3, 64, 64),
    "prefill": ([-1] * 5 + [0] * 33 + [3] * 16 + [1] * 7 + [3] * 2, 2, 64, 64),
    "odd": ([-1, 5, 5, 5, 0, -1, -1, 2] + [4] * 17, 3, 24, 40),
    "head_96": ([0, 0, 1], 1, 64, 96),
    "head_128": ([0] * 18 + [1], 1, 64, 128),
    "nothing_to_see": ([-1] * 19, 2, 64, 64),
}
ALL_PREVIOUS = {
    "growing": [[-1, -1, -1]] * 3 + [[0, -1, -1]] * 20 + [[0, 4, -1]] * 5 + [[0, 4, 2]] * 17,
    "gaps_and_twice": [[-1, 3, -1]] * 2 + [[1, -1, 1]] * 3,
}


def pool(heads: int, keys: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """The second of two layers of a pool of six pages: a view with a page stride of its own."""
    return torch.randn(6, 2, heads, 2, keys, head_dim).to(dtype)[:, 1]


def slots_of(rows: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients(
    shape: tuple[list[int], int, int, int], dtype: torch.dtype, close: Check, gradients: Callable[..., list[Tensor]]
) -> None:
    rows, heads, keys, head_dim = shape
    slots, kv = slots_of(rows), pool(heads, keys, head_dim, dtype)
    query = torch.randn(len(rows), heads, head_dim).to(dtype)
    actual = gradients(lambda q, p: media_attention(q, p, slots, scale=0.3), query, kv)
    expected = gradients(lambda q, p: media_attention_reference(q, p, slots, scale=0.3), query.float(), kv.float())
    assert not actual[0][slots < 0].any()  # not almost zero
    for name, got, want, factor in zip(("out", "query", "media_kv"), actual, expected, (1, 2, 2), strict=True):
        close(name, got, want, factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ALL_PREVIOUS.values(), ids=ALL_PREVIOUS.keys())
def test_all_previous_media(
    rows: list[list[int]], dtype: torch.dtype, close: Check, gradients: Callable[..., list[Tensor]]
) -> None:
    slots, kv = slots_of(rows), pool(2, 24, 40, dtype)
    query = torch.randn(len(rows), 2, 40).to(dtype)
    actual = gradients(lambda q, p: media_attention(q, p, slots, scale=0.3), query, kv)
    expected = gradients(lambda q, p: media_attention_reference(q, p, slots, scale=0.3), query.float(), kv.float())
    assert not actual[0][(slots < 0).all(1)].any()
    for name, got, want, factor in zip(("out", "query", "media_kv"), actual, expected, (1, 2, 2), strict=True):
        close(name, got, want, factor)
    close("serving", media_attention(query, kv, slots, scale=0.3), expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES["odd"], SHAPES["head_128"]], ids=["odd", "head_128"])
def test_query_norm(
    shape: tuple[list[int], int, int, int], dtype: torch.dtype, close: Check, gradients: Callable[..., list[Tensor]]
) -> None:
    rows, heads, keys, head_dim = shape
    slots, kv = slots_of(rows), pool(heads, keys, head_dim, dtype)
    query, weight = torch.randn(len(rows), heads, head_dim).to(dtype), torch.rand(head_dim).to(dtype)

    def run(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, p, w: function(q, p, slots, scale=0.3, query_norm=w, query_norm_eps=1e-4)

    expected = gradients(run(media_attention_reference), query.float(), kv.float(), weight.float())
    close("in the kernel", run(media_attention)(query, kv, weight), expected[0])
    for name, got, want in zip(
        ("out", "query", "media_kv", "query_norm"), gradients(run(media_attention), query, kv, weight), expected,
        strict=True,
    ):  # fmt: skip
        close(name, got, want, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_of_8_bits(dtype: torch.dtype, close: Check) -> None:
    rows, heads, keys, head_dim = SHAPES["odd"]
    slots, kv = slots_of(rows), pool(heads, keys, head_dim, dtype)
    query = torch.randn(len(rows), heads, head_dim).to(dtype)
    pages, scales = quantise_pages(kv)
    actual = media_attention(query, pages, slots, scale=0.3, media_scale=scales)
    expected = media_attention_reference(query.float(), pages, slots, scale=0.3, media_scale=scales)
    close("against the dequantised", actual, expected)
    whole = media_attention_reference(query.float(), kv.float(), slots, scale=0.3)
    assert (actual.float() - whole).norm() / whole.norm() <= 1.5e-2


def test_pages_of_8_bits_are_refused_where_the_kernel_has_no_scales() -> None:
    pages, scales = quantise_pages(pool(2, 64, 64, torch.float32))
    query = torch.randn(2, 2, 64)
    with pytest.raises(ValueError, match="one page per token"):
        media_attention(query, pages, slots_of([[0, 1]] * 2), scale=0.3, media_scale=scales)
    with pytest.raises(ValueError, match="no gradients"):
        media_attention(query.requires_grad_(), pages, slots_of([0, 1]), scale=0.3, media_scale=scales)


def test_an_unread_page_may_hold_anything() -> None:
    kv = pool(2, 64, 64, torch.float32)
    slots = slots_of([-1, -1, 2, 2, 1, 1])
    query = torch.randn(6, 2, 64)
    before = media_attention(query, kv, slots, scale=0.3)
    kv[[0, 3, 4, 5]] = float("nan")
    assert torch.equal(media_attention(query, kv, slots, scale=0.3), before)
    assert torch.equal(before[:2], torch.zeros(2, 2, 64))


@pytest.mark.parametrize("heads_per_program", [1, 2, 4])
def test_the_number_of_heads_per_program_changes_nothing(
    heads_per_program: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv, slots = pool(3, 64, 64, torch.float32), slots_of([0] * 20 + [2])
    query = torch.randn(21, 3, 64)
    expected = media_attention(query, kv, slots, scale=0.3)
    monkeypatch.setattr(module, "_heads_per_program", lambda tiles, heads: heads_per_program)
    assert torch.equal(media_attention(query, kv, slots, scale=0.3), expected)


def test_empty_tiles_are_skipped(close: Check, gradients: Callable[..., list[Tensor]]) -> None:
    """Tables that are built on a device have them."""
    kv, slots = pool(2, 64, 64, torch.float32), slots_of([3] * 20 + [-1, 2])
    query = torch.randn(22, 2, 64)
    records = tile_records(slots, 16)
    padded = torch.zeros(9, 4, dtype=torch.int32)
    padded[[0, 2, 5, 8]] = records
    tables = gradients(lambda q, p: media_attention(q, p, slots, scale=0.3, plan=padded), query, kv)
    expected = gradients(lambda q, p: media_attention(q, p, slots, scale=0.3), query, kv)
    for got, want in zip(tables, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy, about the neighbours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_the_same_alone_at_every_index_and_among_nan(dtype: torch.dtype) -> None:
    kv = pool(2, 64, 64, dtype)
    row = torch.randn(1, 2, 64).to(dtype)
    alone = media_attention(row, kv, slots_of([3]), scale=0.3)
    for index in range(16):
        for neighbour in (torch.randn(16, 2, 64).to(dtype), torch.full((16, 2, 64), float("nan"), dtype=dtype)):
            query = neighbour.clone()
            query[index] = row[0]
            out = media_attention(query, kv, slots_of([3] * 16), scale=0.3)
            assert torch.equal(out[index], alone[0])
    after_other_rows = media_attention(torch.cat([neighbour, row]), kv, slots_of([1] * 9 + [3] * 8), scale=0.3)
    assert torch.equal(after_other_rows[-1], alone[0])


def test_pages_beyond_the_reach_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    stride = 2**30 + 64  # page 2 begins past 2**31 elements; untouched memory is not allocated
    small = torch.randn(3, 1, 2, 16, 16).half()
    kv = torch.empty(2 * stride + 512, dtype=torch.float16).as_strided(small.shape, (stride, 512, 256, 16, 1))
    for page in range(3):
        kv[page] = small[page]
    query, slots = torch.randn(3, 1, 16).half(), slots_of([2, 0, 1])
    assert torch.equal(media_attention(query, kv, slots, scale=0.3), media_attention(query, small, slots, scale=0.3))
    every = slots_of([[2, 1]] * 3)
    assert torch.equal(media_attention(query, kv, every, scale=0.3), media_attention(query, small, every, scale=0.3))


def test_a_query_in_a_fused_projection_is_read_without_a_copy() -> None:
    fused, kv, slots = torch.randn(5, 3 * 2 * 64), pool(2, 64, 64, torch.float32), slots_of([0, 0, 1, 1, -1])
    query = fused[:, :128].view(5, 2, 64)
    out = media_attention(query, kv, slots, scale=0.3)
    assert torch.equal(out, media_attention(query.contiguous(), kv, slots, scale=0.3))


def test_pages_that_the_kernel_cannot_read_are_refused() -> None:
    kv, query, slots = torch.randn(3, 2, 2, 64, 64), torch.randn(1, 2, 64), slots_of([0])
    with pytest.raises(ValueError, match="within a page"):
        media_attention(query, kv.transpose(3, 4), slots, scale=0.3)
    crooked = torch.randn(3 * 16400).as_strided((3, 2, 2, 64, 64), (16388, 8192, 4096, 64, 1))
    with pytest.raises(ValueError, match="not a multiple of 16"):
        media_attention(query, crooked, slots, scale=0.3)


def test_new_projections_are_copied_for_training(close: Check, gradients: Callable[..., list[Tensor]]) -> None:
    slots, query, projected = slots_of([0, 0, 2]), torch.randn(3, 2, 64), torch.randn(2, 3, 24, 2, 64)

    def run(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, p: function(q, p.permute(1, 3, 0, 2, 4), slots, scale=0.3)  # [M, H, 2, R, K]

    actual = gradients(run(media_attention), query, projected)
    expected = gradients(run(media_attention_reference), query, projected)
    for name, got, want in zip(("out", "query", "projected"), actual, expected, strict=True):
        close(name, got, want)


def test_two_runs_of_the_backward_pass_agree_bit_for_bit(gradients: Callable[..., list[Tensor]]) -> None:
    kv, slots = pool(2, 64, 64, torch.float32), slots_of([0] * 20 + [1] * 3 + [0] * 20)
    query = torch.randn(43, 2, 64)
    first, second = (gradients(lambda q, p: media_attention(q, p, slots, scale=0.3), query, kv) for _ in range(2))
    for got, want in zip(first, second, strict=True):
        assert torch.equal(got, want)


def test_the_launch_configuration_sets_the_tile_size() -> None:
    slots = slots_of([1] * 33)
    assert media_tiles(slots, 64, torch.float32)[:, 1].tolist() == [16, 16, 1]
