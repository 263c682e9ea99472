"""Stage 2: comparison with the references in each dtype, and invariance of a row under its position in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import INTERPRETING, Launch, launch_config, use_triton
from kernels.bench import contenders
from kernels.bench.measure import Report, Row, Stopwatch
from kernels.bench.sizes import Sizes, Spec
from kernels.bench.variants import VARIANTS
from kernels.media_attention import media_attention, media_attention_reference
from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.resampler_attention import resampler_attention, resampler_attention_reference
from kernels.tiles import tile_records

STAGE = "2 correctness"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@contextmanager
def use_launch(operator: str, head_dim: int, dtype: torch.dtype, launch: Launch) -> Iterator[None]:
    """Replace a row of the launch table until the block ends."""
    key = (operator, backend.architecture(), head_dim, str(dtype).removeprefix("torch."))
    before = dict(backend.TABLE)
    backend.TABLE[key] = launch
    try:
        yield
    finally:
        backend.TABLE.clear()
        backend.TABLE.update(before)


def device_tiles(slots: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor | None:
    """Return the tile table as a server builds it, from host memory once per step."""
    if not use_triton(slots):
        return None
    records = tile_records(slots.cpu(), launch_config("media", head_dim, dtype).block)
    return records.to(slots.device)


def _poison(device: torch.device) -> None:
    """Leave NaN in memory that torch's allocator will reuse for the next outputs."""
    for size in (1 << 16, 1 << 22):
        torch.full((size,), float("nan"), device=device)


def check(report: Report, case: str, name: str, actual: Tensor, expected: Tensor) -> None:
    error, limit = relative_error(actual, expected), TOLERANCE[actual.dtype]
    verdict = "ok" if error <= limit else f"WRONG: more than {limit:.0e}"
    report.add(Row(STAGE, case, name, 1e6 * error, "ppm", note=verdict))


def check_other(
    report: Report,
    case: str,
    name: str,
    run: Callable[[], Tensor],
    expected: Tensor,
    rows: Tensor | slice = slice(None),
) -> None:
    """Check an implementation that is not served, and that this machine or torch may reject."""
    try:
        actual = run()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        report.add_rejected(STAGE, case, name, error)
    else:
        check(report, case, name, actual[rows], expected[rows])


def _inputs(spec: Spec, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(100, spec.media_heads, spec.media_head_dim, device=device).to(dtype)
    pages = torch.randn(6, spec.media_heads, 2, spec.num_latents, spec.media_head_dim, device=device).to(dtype)
    slots = torch.tensor([-1] * 7 + [0] * 40 + [3] * 33 + [1] * 20, dtype=torch.int32, device=device)
    return query, pages, slots


def _check_media(report: Report, spec: Spec, device: torch.device, dtype: torch.dtype) -> None:
    _poison(device)
    query, pages, slots = _inputs(spec, device, dtype)
    expected = media_attention_reference(query.float(), pages.float(), slots, scale=0.1)
    case = f"media, {spec.name}, {str(dtype).removeprefix('torch.')}"
    tiles = device_tiles(slots, spec.media_head_dim, dtype)
    actual = media_attention(query, pages, slots, scale=0.1, plan=tiles)
    check(report, case, "ours", actual, expected)
    check(report, case, "ours, tile table from the device", media_attention(query, pages, slots, scale=0.1), expected)
    for name, variant in VARIANTS.items():
        check_other(report, case, name, partial(variant, query, pages, slots, tiles, 0.1), expected)
    if dtype != torch.bfloat16:
        return
    has_page = slots >= 0  # the results of contenders for a token without a page are unspecified
    implementations: dict[str, contenders.Contender] = {
        "dense mask": contenders.dense_mask,
        "einsum": contenders.einsum,
        "gather": contenders.gather,
    }
    if device.type == "cuda":
        implementations |= contenders.varlen(pages, slots.clamp(min=0))
    for name, contender in implementations.items():
        run = partial(contender, query, pages, slots.clamp(min=0), 0.1)
        check_other(report, case, name, run, expected, has_page)


def _check_text(report: Report, device: torch.device, dtype: torch.dtype) -> None:
    _poison(device)
    kv_cache = torch.randn(80, 2, 2, 16, 64, device=device).to(dtype)
    table = torch.stack([torch.arange(40), torch.cat([torch.arange(20), torch.arange(40, 60)])]).to(device, torch.int32)
    contexts = torch.tensor([600, 500], dtype=torch.int32, device=device)
    slopes = torch.rand(8, device=device)
    for name, counts in {"decode": (1, 1), "prefill": (100, 33)}.items():
        starts = torch.tensor((0, *counts), device=device).cumsum(0).to(torch.int32)
        query = torch.randn(sum(counts), 8, 64, device=device).to(dtype)
        rest = (table, starts, contexts)
        expected = paged_attention_reference(query.float(), kv_cache.float(), *rest, scale=0.1, alibi_slopes=slopes)
        out = paged_attention(query, kv_cache, *rest, scale=0.1, alibi_slopes=slopes)
        check(report, f"paged {name}, {str(dtype).removeprefix('torch.')}", "ours", out, expected)


def _check_resampler(report: Report, device: torch.device, dtype: torch.dtype) -> None:
    _poison(device)
    inputs = [torch.randn(2, n, 4, 64, device=device).to(dtype) for n in (64, 257, 257, 64, 64)]
    expected = resampler_attention_reference(*(x.float() for x in inputs), scale=0.1)
    case = f"resampler, {str(dtype).removeprefix('torch.')}"
    check(report, case, "ours", resampler_attention(*inputs, scale=0.1), expected)


def _is_invariant(run: Callable[[Tensor, Tensor], Tensor], row: Tensor, slot: int) -> bool:
    """Return whether a row's bits are the same alone and at each index of a tile, with random and with NaN neighbours."""
    slots = torch.full((16,), slot, dtype=torch.int32, device=row.device)
    alone = run(row, slots[:1])[0]
    for neighbours in (torch.randn_like(row.expand(16, -1, -1)), torch.full_like(row.expand(16, -1, -1), float("nan"))):
        for index in range(16):
            query = neighbours.clone()
            query[index] = row[0]
            if not torch.equal(run(query, slots)[index], alone):
                return False
    return True


def _check_invariance(report: Report, spec: Spec, device: torch.device) -> None:
    query, pages, _ = _inputs(spec, device, torch.bfloat16)

    def run(query: Tensor, slots: Tensor) -> Tensor:
        return media_attention(query, pages, slots, scale=0.1)

    is_same = _is_invariant(run, query[:1], 3)
    report.add(
        Row(STAGE, f"media, {spec.name}: bits of a row", "ours", float(is_same), "", note="1: the same in every batch")
    )
    if not use_triton(query) or INTERPRETING:
        return
    slots = torch.full((len(query),), 3, dtype=torch.int32, device=device)
    narrow = run(query, slots)
    wide = replace(launch_config("media", spec.media_head_dim, query.dtype), block=32)
    with use_launch("media", spec.media_head_dim, query.dtype, wide):
        is_same = torch.equal(run(query, slots), narrow)
    report.add(Row(STAGE, f"media, {spec.name}: 16 rows and 32", "ours", float(is_same), "", note="1: the same bits"))


def check_all(report: Report, watch: Stopwatch, sizes: Sizes) -> None:
    for dtype in TOLERANCE:
        for spec in sizes.core:
            _check_media(report, spec, watch.device, dtype)
        _check_text(report, watch.device, dtype)
        _check_resampler(report, watch.device, dtype)
    for spec in sizes.core:
        _check_invariance(report, spec, watch.device)
