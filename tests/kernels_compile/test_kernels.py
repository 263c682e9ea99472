"""Every shipped configuration compiles without spills or narrow copies, and to matrix instructions, on every target.

Counts are bounds and not equalities: another version of Triton may use one register more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.media_attention import media_attention
from kernels.paged_attention import paged_attention
from kernels.resampler_attention import resampler_attention
from kernels.rows import add_layer_norm, add_rms_norm, gated_residual, layer_norm, rms_norm, swiglu
from kernels.self_attention import kv_store, rotate_and_store
from kernels.spans import Offsets, Spans
from tests.kernels_compile.targets import SHARED_LIMIT, with_targets

BFLOAT16 = torch.bfloat16
TWO_GIB = 1 << 31


def pool(*page: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    """Return more elements than 32 bits can address, as in production; untouched memory is not allocated."""
    size = torch.Size(page).numel() * dtype.itemsize
    return torch.empty(TWO_GIB // size + 2, *page, dtype=dtype)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.autograd.grad(out, leaves, torch.empty_like(out))


def media(heads: int, head_dim: int, dtype: torch.dtype = BFLOAT16, **options: Any) -> None:
    query, slots = torch.empty(64, heads, head_dim, dtype=dtype), torch.zeros(64, dtype=torch.int32)
    media_attention(query, pool(heads, 2, 64, head_dim, dtype=dtype), slots, scale=0.1, **options)


def media_int8(heads: int, head_dim: int) -> None:
    query, slots = torch.empty(64, heads, head_dim, dtype=BFLOAT16), torch.zeros(64, dtype=torch.int32)
    pages = pool(heads, 2, 64, head_dim, dtype=torch.int8)
    media_attention(query, pages, slots, scale=0.1, media_scale=torch.empty(pages.shape[:-1]))


def media_training(heads: int, head_dim: int, num_slots: int) -> None:
    slots = torch.zeros(64, num_slots, dtype=torch.int32)
    slots = slots[:, 0].contiguous() if num_slots == 1 else slots
    query, kv = torch.empty(64, heads, head_dim, dtype=BFLOAT16), torch.empty(3, heads, 2, 64, head_dim, dtype=BFLOAT16)
    with_gradients(lambda q, p: media_attention(q, p, slots, scale=0.1), query, kv)


def resampler(heads: int, head_dim: int) -> None:
    features, latents = (torch.empty(2, n, 2, heads, head_dim, dtype=BFLOAT16) for n in (256, 64))
    query = torch.empty(2, 64, heads, head_dim, dtype=BFLOAT16)
    with_gradients(lambda *x: resampler_attention(*x, scale=0.1), query, *features.unbind(2), *latents.unbind(2))


def paged(heads: int, kv_heads: int, head_dim: int, queries: int, *, alibi: bool = False, rotary_dim: int = 0) -> None:
    starts = (torch.arange(9) * queries).to(torch.int32)
    query = torch.empty(8 * queries, heads + 2 * kv_heads, head_dim, dtype=BFLOAT16)[:, :heads]
    table, positions = torch.zeros(8, 64, dtype=torch.int32), torch.zeros(8 * queries, dtype=torch.int64)
    paged_attention(
        query, pool(2, kv_heads, 16, head_dim), table, starts, torch.full((8,), 500, dtype=torch.int32), scale=0.1,
        alibi_slopes=torch.ones(heads) if alibi else None, spans=spans_with_offsets(positions, table, rotary_dim),
    )  # fmt: skip


def spans_with_offsets(positions: Tensor, table: Tensor, rotary_dim: int) -> Spans | None:
    """Return spans with offsets of keys, or None if nothing is rotated."""
    if not rotary_dim:
        return None
    angles = torch.ones(64, rotary_dim)
    return Spans(positions, table, torch.full_like(table, 16), Offsets(table, angles, angles))


def rows() -> None:
    x, channel = torch.empty(64, 4096, dtype=BFLOAT16), torch.zeros(4096, dtype=BFLOAT16)
    rms_norm(x, channel, 1e-5)
    layer_norm(x, channel, channel, 1e-5)
    add_rms_norm(x, x, channel, 1e-5)
    add_layer_norm(x, x, channel, channel, 1e-5)
    swiglu(x)
    with_gradients(gated_residual, x, x, channel)
    with_gradients(gated_residual, x, x, channel[:1])
    key = torch.empty(8, 96, 128, dtype=BFLOAT16)[:, 32:64]
    kv_store(key, key, pool(2, 32, 16, 128), torch.zeros(8, dtype=torch.int64))
    rotation(128, 128)


def rotation(head_dim: int, rotary_dim: int) -> None:
    fused, cos = torch.empty(8, 96, head_dim, dtype=BFLOAT16), torch.empty(8, 1, rotary_dim, dtype=BFLOAT16)
    slots = torch.zeros(8, dtype=torch.int64)
    rotate_and_store(fused[:, :64], fused[:, 64:], cos, cos, pool(2, 32, 16, head_dim), slots)


@dataclass(frozen=True)
class Case:
    launch: Callable[[], None]
    # by kernel, the bytes of its tiles, which must be loaded by 16 bytes per thread
    tiles: dict[str, int] = field(default_factory=dict)
    tensor_cores: bool = True


def tile_bytes(head_dim: int, *rows: int) -> int:
    return 2 * head_dim * sum(rows)


FORWARD = {64: {"_forward": tile_bytes(64, 64, 64, 16)}, 128: {"_forward": tile_bytes(128, 64, 64, 16)}}
# keys and values of a block, queries and the other elements of their rotated pairs
OFFSETS = {head_dim: {"_attend_tile": tile_bytes(head_dim, 16, 16, 16, 16)} for head_dim in (64, 80, 128)}
WEIGHT = torch.empty(128, dtype=BFLOAT16)
CASES = {
    "media_64": Case(lambda: media(8, 64), FORWARD[64]),
    "media_64_float16": Case(lambda: media(8, 64, torch.float16), FORWARD[64]),
    "media_128": Case(lambda: media(32, 128), FORWARD[128]),
    "media_128_query_norm": Case(lambda: media(32, 128, query_norm=WEIGHT), FORWARD[128]),
    "media_64_int8": Case(lambda: media_int8(8, 64), {"_forward": tile_bytes(64, 32, 32, 16)}),
    "media_64_training": Case(
        lambda: media_training(8, 64, 1),
        {**FORWARD[64], "_query_gradient": tile_bytes(64, 64, 64), "_page_gradients": tile_bytes(64, 64, 64)},
    ),
    "media_64_all_previous": Case(lambda: media_training(8, 64, 5), {"_forward_all": tile_bytes(64, 64, 64, 16)}),
    "media_128_training": Case(lambda: media_training(32, 128, 1), FORWARD[128]),
    "resampler_64": Case(lambda: resampler(8, 64), {"_forward": tile_bytes(64, 4 * 64)}),
    "resampler_96": Case(lambda: resampler(16, 96), {"_forward": tile_bytes(96, 4 * 64)}),
    "paged_64_grouped_decode": Case(lambda: paged(9, 3, 64, 1, alibi=False), {"_attend_tile": tile_bytes(64, 128)}),
    "paged_64_grouped_prefill": Case(lambda: paged(9, 3, 64, 40, alibi=False), {"_attend_tile": tile_bytes(64, 128)}),
    "paged_80_decode": Case(lambda: paged(32, 32, 80, 1, alibi=False), {"_attend_tile": tile_bytes(80, 128)}),
    "paged_80_prefill": Case(lambda: paged(32, 32, 80, 40, alibi=False), {"_attend_tile": tile_bytes(80, 128)}),
    "paged_128_alibi_decode": Case(lambda: paged(32, 32, 128, 1, alibi=True), {"_attend_tile": tile_bytes(128, 128)}),
    "paged_128_alibi_prefill": Case(lambda: paged(32, 32, 128, 40, alibi=True), {"_attend_tile": tile_bytes(128, 128)}),
    "paged_64_offsets_decode": Case(lambda: paged(9, 3, 64, 1, rotary_dim=64), OFFSETS[64]),
    "paged_64_offsets_prefill": Case(lambda: paged(9, 3, 64, 40, rotary_dim=64), OFFSETS[64]),
    "paged_80_offsets_decode": Case(lambda: paged(32, 32, 80, 1, rotary_dim=20), OFFSETS[80]),
    "paged_80_offsets_prefill": Case(lambda: paged(32, 32, 80, 40, rotary_dim=20), OFFSETS[80]),
    "paged_128_offsets_decode": Case(lambda: paged(32, 32, 128, 1, rotary_dim=128), OFFSETS[128]),
    "paged_128_offsets_prefill": Case(lambda: paged(32, 32, 128, 40, rotary_dim=128), OFFSETS[128]),
    # exact products of float32 are no matter for tensor cores
    "media_64_float32": Case(lambda: media(8, 64, torch.float32), tensor_cores=False),
    "rows": Case(
        rows,
        {
            "_norm_row": 4096 * 2,
            "_add_norm_row": 2 * 4096 * 2,
            "_swiglu_block": 2 * 2048 * 2,
            "_store_token": 32 * 128 * 2,
            "_rotate_and_store": 3 * 2048 * 2,
        },
        tensor_cores=False,
    ),
    "rows_partly_rotated": Case(lambda: rotation(80, 20), tensor_cores=False),
}
WITHOUT_PRODUCTS = {"_merge_parts"}
# loads of an element per thread: the weight of a norm, unless there are others
ELEMENT_LOADS = {"_rotate_and_store": 2}  # cos and sin


@pytest.mark.parametrize(("name", "target"), with_targets(CASES))
def test_compiles_well(name: str, target: str, compile_for: Callable[..., list[Any]]) -> None:
    case = CASES[name]
    compiled = compile_for(target, case.launch)
    assert {kernel.name for kernel in compiled} >= case.tiles.keys()
    for kernel in compiled:
        print(kernel)
        assert kernel.spills == 0, kernel
        assert kernel.shared <= SHARED_LIMIT[target], kernel
        if case.tensor_cores and kernel.name not in WITHOUT_PRODUCTS:
            assert kernel.tensor_core > 0, kernel
        if kernel.name in case.tiles:
            assert kernel.wide_copies >= case.tiles[kernel.name] // (16 * kernel.threads), kernel
            assert kernel.halfword_copies <= ELEMENT_LOADS.get(kernel.name, 1), kernel


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_page_is_requested_before_the_first_wait(
    head_dim: int, target: str, compile_for: Callable[..., list[Any]]
) -> None:
    """In a plain loop, V would be loaded only after the round trip of K: two latencies in a row."""
    [kernel] = compile_for(target, lambda: media(8, head_dim))
    assert kernel.early_copies >= FORWARD[head_dim]["_forward"] // (16 * 128)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_decode_has_the_next_keys_and_values_in_flight_while_it_computes(
    head_dim: int, target: str, compile_for: Callable[..., list[Any]]
) -> None:
    """A group of copies is of keys or of values; a wait that leaves two in flight leaves the next step's."""
    kernels = {kernel.name: kernel for kernel in compile_for(target, lambda: paged(32, 32, head_dim, 1))}
    assert kernels["_attend_tile"].copies_in_flight >= 2


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_tiles_of_16_and_of_32_rows_sum_in_one_order_and_those_of_64_do_not(
    target: str, compile_for: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's bits are then the same in every batch, and the launch table needs no larger tile for media."""
    layouts = []
    for block in (16, 32, 64):
        monkeypatch.setitem(backend.DEFAULTS, "media", replace(backend.DEFAULTS["media"], block=block))
        [kernel] = compile_for(target, lambda: media(8, 64))
        layouts.append(kernel.layouts)
    assert layouts[0] == layouts[1] != layouts[2]


def test_launches_are_specialised_as_in_production(compile_for: Callable[..., list[Any]]) -> None:
    """A pool that is not aligned to 16 bytes is read in pieces, which this suite detects."""
    query, slots = torch.empty(64, 8, 64, dtype=BFLOAT16), torch.zeros(64, dtype=torch.int32)
    shifted = torch.empty(8 * 2 * 64 * 64 * 3 + 1, dtype=BFLOAT16)[1:].view(3, 8, 2, 64, 64)
    [kernel] = compile_for("sm_90", lambda: media_attention(query, shifted, slots, scale=0.1))
    assert kernel.wide_copies < FORWARD[64]["_forward"] // (16 * 128)


def unaligned(*values: int) -> Tensor:
    """Return a table at an unaligned offset, as in the single upload of a step."""
    return torch.tensor((0, *values), dtype=torch.int32)[1:]


def step(
    counts: tuple[int, ...],
    width: int,
    media_pool: Tensor,
    kv_pool: Tensor,
    *,
    spans: bool = False,
    rotary_dim: int = 0,
) -> None:
    num_tokens, num_sequences = sum(counts), len(counts)
    fused, slots = torch.empty(num_tokens, 24, 64, dtype=BFLOAT16), torch.zeros(num_tokens, dtype=torch.int64)
    query, key, value = fused.split(8, 1)
    media_attention(query, media_pool, unaligned(*(i // 3 for i in range(num_tokens))), scale=0.1)
    kv_store(key, value, kv_pool, slots)
    cos = torch.empty(num_tokens, 1, 64, dtype=BFLOAT16)
    rotate_and_store(fused[:, :16], value, cos, cos, kv_pool, slots)
    table = unaligned(*[0] * num_sequences * width).view(num_sequences, width)
    starts, lengths = unaligned(0, *counts).cumsum(0).to(torch.int32), unaligned(*[400] * num_sequences)
    positions = torch.zeros(num_tokens, dtype=torch.int64)
    tables = (
        Spans(positions, table, torch.full_like(table, 16))
        if spans
        else spans_with_offsets(positions, table, rotary_dim)
    )
    paged_attention(query, kv_pool, table, starts, lengths, scale=0.1, spans=tables)


def test_nothing_is_compiled_while_a_request_waits(compile_for: Callable[..., list[Any]]) -> None:
    """Two steps at start compile all binaries, for any numbers of tokens, sequences and blocks, with spans or without.

    Two more compile those of a model with offsets of keys.
    """
    pools = (pool(8, 2, 64, 64), pool(2, 8, 16, 64))

    def serve() -> None:
        for counts in ((1,), (1, 1), (1,) * 16, (1,) * 33, (16, 1), (31, 7), (48,)):
            for width in (48, 67):
                step(counts, width, *pools)
                step(counts, width, *pools, spans=True)
                step(counts, width, *pools, rotary_dim=64)

    def warm_up() -> None:
        step((1, 1), 64, *pools)
        step((20, 2), 64, *pools)
        step((1, 1), 64, *pools, rotary_dim=64)
        step((20, 2), 64, *pools, rotary_dim=64)

    warm = {kernel.binary: kernel.name for kernel in compile_for("sm_90", warm_up)}
    served = {kernel.binary: kernel.name for kernel in compile_for("sm_90", serve)}
    assert served.items() <= warm.items()
