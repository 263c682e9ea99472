"""Stage 2: compares kernels with references in each dtype, and checks that a row does not depend on its batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import Launch, launch_config, use_triton
from kernels.bench import contenders
from kernels.bench.measure import WRONG, Result, Stopwatch
from kernels.bench.sizes import Sizes, Spec
from kernels.bench.task import Task
from kernels.bench.variants import VARIANTS
from kernels.media_attention import media_attention, media_attention_reference
from kernels.media_attention_gpu import media_tiles
from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.resampler_attention import resampler_attention, resampler_attention_reference

STAGE = "2 correctness"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
FROM_DEVICE = "ours, tile table from the device"


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
    return media_tiles(slots.cpu(), head_dim, dtype).to(slots.device)


def poison(device: torch.device) -> None:
    """Leave NaN in memory that torch's allocator will reuse for the next outputs."""
    for size in (1 << 16, 1 << 22):
        torch.full((size,), float("nan"), device=device)


def compare(actual: Tensor, expected: Tensor) -> Result:
    error, limit = relative_error(actual, expected), TOLERANCE[actual.dtype]
    # NaN is not within the limit
    note = "ok" if error <= limit else f"{WRONG}: more than {limit:.0e}"
    return Result(value=1e6 * error, unit="ppm", note=note)


def _inputs(spec: Spec, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(100, spec.media_heads, spec.media_head_dim, device=device).to(dtype)
    pages = torch.randn(6, spec.media_heads, 2, spec.num_latents, spec.media_head_dim, device=device).to(dtype)
    slots = torch.tensor([-1] * 7 + [0] * 40 + [3] * 33 + [1] * 20, dtype=torch.int32, device=device)
    return query, pages, slots


def media_cases(spec: Spec, dtype: str, *, is_gpu: bool) -> list[str]:
    """Return the names of the implementations that are checked: the contenders in bfloat16 only."""
    names = ["ours", FROM_DEVICE, *VARIANTS]
    if dtype == "bfloat16":
        names += [*contenders.PLAIN, *(contenders.VARLEN if is_gpu else ())]
    return names


def check_media(watch: Stopwatch, sizes: Sizes, *, spec: str, dtype: str, name: str) -> Result:
    poison(watch.device)
    of, number_format = sizes.spec(spec), DTYPES[dtype]
    query, pages, slots = _inputs(of, watch.device, number_format)
    expected = media_attention_reference(query.float(), pages.float(), slots, scale=0.1)
    tiles = device_tiles(slots, of.media_head_dim, number_format)
    if name == "ours":
        return compare(media_attention(query, pages, slots, scale=0.1, plan=tiles), expected)
    if name == FROM_DEVICE:
        return compare(media_attention(query, pages, slots, scale=0.1), expected)
    if name in VARIANTS:
        return compare(VARIANTS[name](query, pages, slots, tiles, 0.1), expected)
    has_page = slots >= 0  # the results of contenders for a token without a page are unspecified
    known = slots.clamp(min=0)
    contender = contenders.PLAIN[name] if name in contenders.PLAIN else contenders.varlen(pages, known)[name]
    return compare(contender(query, pages, known, 0.1)[has_page], expected[has_page])


def check_text(watch: Stopwatch, sizes: Sizes, *, dtype: str, counts: tuple[int, ...]) -> Result:
    poison(watch.device)
    device, number_format = watch.device, DTYPES[dtype]
    kv_cache = torch.randn(80, 2, 2, 16, 64, device=device).to(number_format)
    table = torch.stack([torch.arange(40), torch.cat([torch.arange(20), torch.arange(40, 60)])]).to(device, torch.int32)
    contexts = torch.tensor([600, 500], dtype=torch.int32, device=device)
    slopes = torch.rand(8, device=device)
    starts = torch.tensor((0, *counts), device=device).cumsum(0).to(torch.int32)
    query = torch.randn(sum(counts), 8, 64, device=device).to(number_format)
    rest = (table, starts, contexts)
    expected = paged_attention_reference(query.float(), kv_cache.float(), *rest, scale=0.1, alibi_slopes=slopes)
    return compare(paged_attention(query, kv_cache, *rest, scale=0.1, alibi_slopes=slopes), expected)


def check_resampler(watch: Stopwatch, sizes: Sizes, *, dtype: str) -> Result:
    poison(watch.device)
    inputs = [torch.randn(2, n, 4, 64, device=watch.device).to(DTYPES[dtype]) for n in (64, 257, 257, 64, 64)]
    expected = resampler_attention_reference(*(x.float() for x in inputs), scale=0.1)
    return compare(resampler_attention(*inputs, scale=0.1), expected)


def check_invariance(watch: Stopwatch, sizes: Sizes, *, spec: str) -> Result:
    """Compare a row's bits alone with those at each index of a tile, with random and with NaN neighbours."""
    query, pages, _ = _inputs(sizes.spec(spec), watch.device, torch.bfloat16)
    slots = torch.full((16,), 3, dtype=torch.int32, device=watch.device)
    tile = query[:1].expand(16, -1, -1)
    alone = media_attention(query[:1], pages, slots[:1], scale=0.1)[0]
    for neighbours in (torch.randn_like(tile), torch.full_like(tile, float("nan"))):
        for index in range(16):
            mixed = neighbours.clone()
            mixed[index] = query[0]
            if not torch.equal(media_attention(mixed, pages, slots, scale=0.1)[index], alone):
                return _same_bits(False)
    return _same_bits(True)


def check_tiles(watch: Stopwatch, sizes: Sizes, *, spec: str) -> Result:
    """Compare the bits of tiles of 16 rows with those of tiles of 32."""
    query, pages, _ = _inputs(sizes.spec(spec), watch.device, torch.bfloat16)
    slots = torch.full((len(query),), 3, dtype=torch.int32, device=watch.device)
    narrow = media_attention(query, pages, slots, scale=0.1)
    head_dim = query.shape[2]
    wide = replace(launch_config("media", head_dim, query.dtype), block=32)
    with use_launch("media", head_dim, query.dtype, wide):
        return _same_bits(torch.equal(media_attention(query, pages, slots, scale=0.1), narrow))


def _same_bits(is_same: bool) -> Result:
    return Result(value=float(is_same), unit="", note="ok" if is_same else f"{WRONG}: other bits")


def tasks(sizes: Sizes, *, is_gpu: bool) -> Iterator[Task]:
    task = partial(Task, stage=STAGE)
    for dtype in DTYPES:
        for spec in sizes.core:
            for name in media_cases(spec, dtype, is_gpu=is_gpu):
                arguments = {"spec": spec.name, "dtype": dtype, "name": name}
                case = f"media, {spec.name}, {dtype}"
                yield task(case=case, name=name, function=f"{__name__}:check_media", arguments=arguments)
        for kind, counts in {"decode": (1, 1), "prefill": (100, 33)}.items():
            yield task(
                case=f"paged {kind}, {dtype}",
                name="ours",
                function=f"{__name__}:check_text",
                arguments={"dtype": dtype, "counts": counts},
            )
        yield task(
            case=f"resampler, {dtype}",
            name="ours",
            function=f"{__name__}:check_resampler",
            arguments={"dtype": dtype},
        )
    for spec in sizes.core:
        checks = {"bits of a row in any batch": check_invariance} | ({"16 rows and 32": check_tiles} if is_gpu else {})
        for what, check in checks.items():
            function = f"{__name__}:{check.__name__}"
            yield task(
                case=f"media, {spec.name}: {what}", name="ours", function=function, arguments={"spec": spec.name}
            )
