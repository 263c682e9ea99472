"""Stage 7: measures other launches than those of the launch table, and finds the faster ones on this card.

The operators are the attentions and products with packed weights.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from kernels.backend import Launch, launch_config
from kernels.bench import core
from kernels.bench.correctness import use_launch
from kernels.bench.journal import Key, Row
from kernels.bench.measure import Call, Result, Stopwatch
from kernels.bench.sizes import Sizes, Spec
from kernels.bench.task import Task
from kernels.paged_attention import paged_attention
from kernels.paged_plan import TileShape, plan_tiles
from kernels.resampler_attention import resampler_attention
from kernels.weight_only import int4_linear, int8_linear, pack_int4, quantise_int8

STAGE = "7 launch table"
DTYPE = torch.bfloat16
BLOCK_SIZE = 16
MAX_CACHES = 32
FEATURES, LATENTS = 257, 64
# heads and their size: OpenFlamingo's resampler, and that of IDEFICS
RESAMPLERS = ((8, 64), (16, 96))
# a smaller gain in speed is within the noise
MIN_GAIN = 0.03

# rows per program, warps, stages. So that a row's result stays the same bit for bit, tiles of media attention have 16 or 32
# rows and 4 warps, and those of products with packed weights have the rows of the launch table
CANDIDATES = {
    "media": ((16, 32), (4,), (2, 3)),
    "paged_decode": ((16,), (2, 4, 8), (2, 3, 4, 5)),
    "paged_prefill": ((64, 128), (4, 8), (2, 3)),
    "resampler": ((64, 128), (4, 8), (1, 2)),
    "int8": ((16,), (4, 8), (3, 4, 6, 8)),
    "int8_many": ((64,), (4, 8), (2, 3, 4)),
    "int4": ((16,), (4, 8), (4, 6, 8)),
    "int4_many": ((64,), (4, 8), (2, 3, 4)),
}
# the rows of a product, for each of the two sizes of tile
PRODUCT_ROWS = {"int8": 8, "int8_many": 64, "int4": 8, "int4_many": 64}
PACKED = {"int8": (int8_linear, quantise_int8), "int4": (int4_linear, pack_int4)}


def tasks(sizes: Sizes) -> Iterator[Task]:
    for spec in sizes.core:
        for num_tokens, run in ((sizes.core_decode[-2], 1), (sizes.prefill[0], sizes.shot_tokens - 1)):
            arguments = {"spec": spec.name, "num_tokens": num_tokens, "run": run}
            yield from _tries("media", spec.media_head_dim, core.case(spec, num_tokens, run), measure_media, arguments)
    spec = sizes.models[-1]
    for operator, sequences, new_tokens, is_shared in (
        ("paged_decode", 1, 1, False),
        ("paged_decode", sizes.step[-1], 1, True),
        ("paged_decode", sizes.step[-1], 1, False),
        ("paged_prefill", 1, sizes.context, False),
    ):
        arguments = {"spec": spec.name, "sequences": sequences, "new_tokens": new_tokens, "is_shared": is_shared}
        case = f"{spec.name} {operator}, {sequences} of {sizes.context} tokens{', shared' if is_shared else ''}"
        yield from _tries(operator, spec.head_dim, case, measure_paged, arguments)
    for heads, head_dim in RESAMPLERS:
        case = f"resampler, {heads} heads of {head_dim}, {sizes.resampler_images} images"
        arguments = {"heads": heads, "head_dim": head_dim}
        yield from _tries("resampler", head_dim, case, measure_resampler, arguments)
    for operator, num_rows in PRODUCT_ROWS.items():
        for num_features, width in ((spec.ffn_dim, spec.dim), (spec.dim, spec.ffn_dim)):
            arguments = {"operator": operator, "num_rows": num_rows, "num_features": num_features, "width": width}
            case = f"{operator}, {num_rows} rows of {width}, {num_features} features"
            yield from _tries(operator, width, case, measure_packed, arguments)


def _tries(operator: str, head_dim: int, case: str, measure: Any, arguments: Mapping[str, Any]) -> Iterator[Task]:
    """Yield a task for each launch, the shipped one included."""
    shipped = launch_config(operator, head_dim, DTYPE)
    launches = [Launch(*values) for values in itertools.product(*CANDIDATES[operator])]
    for launch in dict.fromkeys([shipped, *launches]):
        yield Task(
            stage=STAGE,
            case=case,
            name=f"{launch.block} rows, {launch.num_warps} warps, {launch.num_stages} stages",
            function=f"{__name__}:{measure.__name__}",
            arguments={**arguments, "launch": asdict(launch)},
            launch={"operator": operator, "head_dim": head_dim, "dtype": "bfloat16", **asdict(launch)},
        )


def measure_media(
    watch: Stopwatch, sizes: Sizes, *, spec: str, num_tokens: int, run: int, launch: Mapping[str, int]
) -> Result:
    of = sizes.spec(spec)
    with use_launch("media", of.media_head_dim, DTYPE, Launch(**launch)):
        load = core.workload(of, sizes, watch.device, num_tokens, run)
        return Result.of(watch.time(load.kernel_calls()), load.num_bytes)


def measure_paged(
    watch: Stopwatch,
    sizes: Sizes,
    *,
    spec: str,
    sequences: int,
    new_tokens: int,
    is_shared: bool,
    launch: Mapping[str, int],
) -> Result:
    of, operator = sizes.spec(spec), "paged_decode" if new_tokens == 1 else "paged_prefill"
    with use_launch(operator, of.head_dim, DTYPE, Launch(**launch)):
        table = block_table(sizes, sequences, is_shared=is_shared)
        calls = _paged_calls(of, sizes, watch.device, table, new_tokens)
        num_slots = len(table.unique()) * BLOCK_SIZE
        return Result.of(watch.time(calls), 4.0 * num_slots * of.num_heads * of.head_dim)


def block_table(sizes: Sizes, sequences: int, *, is_shared: bool) -> Tensor:
    """Return the blocks of sequences that share the whole blocks of their shots, or nothing."""
    num_blocks = -(-sizes.context // BLOCK_SIZE)
    num_shared = sizes.shared_tokens // BLOCK_SIZE if is_shared else 0
    num_unshared = num_blocks - num_shared
    unshared = num_shared + torch.arange(sequences * num_unshared).view(sequences, num_unshared)
    return torch.cat([torch.arange(num_shared).expand(sequences, -1), unshared], 1).to(torch.int32)


def _paged_calls(spec: Spec, sizes: Sizes, device: torch.device, table: Tensor, new_tokens: int) -> list[Call]:
    """Return a call for each of several caches, which together exceed the caches of a GPU."""
    sequences, rows = len(table), len(table) * new_tokens
    starts = torch.arange(sequences + 1, dtype=torch.int32) * new_tokens
    lengths = torch.full((sequences,), sizes.context, dtype=torch.int32)
    shape = TileShape(BLOCK_SIZE, 1, spec.head_dim, DTYPE)
    plan = plan_tiles(table, starts, lengths, num_tokens=rows, shape=shape).to(device)
    on_device = table.to(device)
    cache = (int(table.max()) + 1, 2, spec.num_heads, BLOCK_SIZE, spec.head_dim)
    num_caches = min(max(sizes.pool_bytes // (2 * prod(cache)), 1), MAX_CACHES)
    caches = torch.randn(num_caches, *cache, device=device, dtype=DTYPE)
    query = torch.randn(rows, spec.num_heads, spec.head_dim, device=device, dtype=DTYPE)
    rest = (on_device, starts.to(device), lengths.to(device))
    attend = partial(paged_attention, scale=spec.head_dim**-0.5, plan=plan.over(on_device, BLOCK_SIZE, None))
    slopes = torch.rand(spec.num_heads, device=device)
    return [partial(attend, query, cache, *rest, alibi_slopes=slopes) for cache in caches]


def measure_resampler(
    watch: Stopwatch, sizes: Sizes, *, heads: int, head_dim: int, launch: Mapping[str, int]
) -> Result:
    lengths = (LATENTS, FEATURES, FEATURES, LATENTS, LATENTS)  # queries, keys and values of features and of latents
    shape = (heads, head_dim)
    inputs = [torch.randn(sizes.resampler_images, n, *shape, device=watch.device, dtype=DTYPE) for n in lengths]
    with use_launch("resampler", head_dim, DTYPE, Launch(**launch)):
        timing = watch.time([partial(resampler_attention, *inputs, scale=head_dim**-0.5)])
    num_bytes = 2.0 * sum(x.numel() for x in inputs) + 2.0 * inputs[0].numel()
    return Result.of(timing, num_bytes, 4.0 * sizes.resampler_images * LATENTS * (FEATURES + LATENTS) * prod(shape))


def measure_packed(
    watch: Stopwatch,
    sizes: Sizes,
    *,
    operator: str,
    num_rows: int,
    num_features: int,
    width: int,
    launch: Mapping[str, int],
) -> Result:
    linear, pack = PACKED[operator.removesuffix("_many")]
    x = torch.randn(num_rows, width, device=watch.device, dtype=DTYPE)
    packed = pack(torch.randn(num_features, width, device=watch.device))
    num_bytes = sum(part.numel() * part.itemsize for part in packed)
    num_copies = min(max(sizes.pool_bytes // num_bytes, 1), MAX_CACHES)  # together they exceed the caches of a GPU
    calls = [partial(linear, x, *(part.clone() for part in packed)) for _ in range(num_copies)]
    with use_launch(operator, width, DTYPE, Launch(**launch)):
        timing = watch.time(calls)
    moved = num_bytes + 2.0 * num_rows * (width + num_features)
    return Result.of(timing, moved, 2.0 * num_rows * num_features * width)


def faster_launches(tried: Iterable[Task], rows: Mapping[Key, Row], architecture: str) -> list[dict[str, Any]]:
    """Return rows of the launch table that are faster than the shipped ones, over all cases of their operator.

    A launch that failed in any case is not considered.
    """
    cases: dict[tuple[str, int], dict[str, dict[Launch, float | None]]] = defaultdict(lambda: defaultdict(dict))
    for task in tried:
        if task.launch is not None and (row := rows.get(task.key)) is not None:
            launch = Launch(**{name: task.launch[name] for name in ("block", "num_warps", "num_stages")})
            cases[task.launch["operator"], task.launch["head_dim"]][task.case][launch] = row.value
    faster = []
    for (operator, head_dim), times in cases.items():
        best = _fastest([*times.values()], launch_config(operator, head_dim, DTYPE))
        if best is not None:
            key = {"operator": operator, "architecture": architecture, "head_dim": head_dim, "dtype": "bfloat16"}
            faster.append({**key, **asdict(best)})
    return faster


def _fastest(cases: list[dict[Launch, float | None]], shipped: Launch) -> Launch | None:
    """Return the launch with the lowest mean time in units of the shipped one's, or None if that is the shipped one."""
    ratios: dict[Launch, float] = {}
    for launch in cases[0]:
        pairs = [(times.get(launch), times.get(shipped)) for times in cases]
        known = [time / base for time, base in pairs if time is not None and base]
        if len(known) == len(pairs):
            ratios[launch] = sum(known) / len(known)
    best = min(ratios, key=lambda launch: ratios[launch], default=shipped)
    return best if ratios.get(best, 1.0) <= 1 - MIN_GAIN else None
