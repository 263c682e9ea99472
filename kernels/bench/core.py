"""Stage 3, media attention alone: decode and prefill, against its bytes, against others, against its own variants."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from kernels import media_attention as operator
from kernels.backend import use_triton
from kernels.bench import contenders
from kernels.bench.correctness import device_tiles, launched
from kernels.bench.machine import Machine
from kernels.bench.measure import Call, Report, Stopwatch, Timing
from kernels.bench.sizes import Sizes, Spec
from kernels.bench.variants import VARIANTS, Variant
from kernels.configs import Launch, architecture, launch_config
from kernels.media_attention import media_attention

STAGE = "3 media attention"
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Workload:
    """One shape: a query, a pool that no cache holds, and a table of slots a launch."""

    what: str
    spec: Spec
    query: Tensor
    pages: Tensor
    slots: list[Tensor]
    num_bytes: float  # that one launch must move
    pages_in_prompt: int

    @property
    def scale(self) -> float:
        return float(self.spec.media_head_dim**-0.5)

    def _tables(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(slots, device_tiles(slots, self.spec.media_head_dim, DTYPE)) for slots in self.slots]

    def ours(self) -> list[Call]:
        return [
            partial(media_attention, self.query, self.pages, slots, scale=self.scale, tiles=tiles)
            for slots, tiles in self._tables()
        ]

    def varied(self, variant: Variant) -> list[Call]:
        return [partial(variant, self.query, self.pages, slots, tiles, self.scale) for slots, tiles in self._tables()]

    def theirs(self, contender: contenders.Contender, slots: Tensor, pages: Tensor) -> Call:
        return partial(contender, self.query, pages, slots, self.scale)


def _pool(spec: Spec, sizes: Sizes, device: torch.device, least: int) -> Tensor:
    page = (spec.media_heads, 2, spec.num_latents, spec.media_head_dim)
    size = 2 * torch.Size(page).numel()
    return torch.randn(max(sizes.pool_bytes // size, least), *page, device=device, dtype=DTYPE)


def _workload(spec: Spec, sizes: Sizes, device: torch.device, num_tokens: int, run: int) -> Workload:
    """Runs of `run` tokens, each on a page of its own; decode has runs of one."""
    runs = -(-num_tokens // run)
    pages = _pool(spec, sizes, device, 2 * runs)
    query = torch.randn(num_tokens, spec.media_heads, spec.media_head_dim, device=device, dtype=DTYPE)
    slots = []
    for launch in range(sizes.launches):
        own = (torch.randperm(runs) + launch * runs) % len(pages)
        slots.append(own.repeat_interleave(run)[:num_tokens].to(device, torch.int32))
    page_bytes = 2 * 2 * spec.num_latents * spec.media_inner
    kind = "decode" if run == 1 else "prefill"
    what = f"{spec.name} {kind}, {num_tokens} tokens, {runs} pages"
    return Workload(what, spec, query, pages, slots, runs * page_bytes + 4.0 * num_tokens * spec.media_inner, runs)


def _others(load: Workload, sizes: Sizes, device: torch.device) -> dict[str, Callable[[], list[Call]]]:
    """The usual ways see the pages of the prompt in one row; the packed and gathering ones see the pool."""
    runs = load.pages_in_prompt
    prompt, slots = load.pages[:runs].contiguous(), load.slots[0]
    order = torch.unique_consecutive(slots, return_inverse=True)[1].to(torch.int32)
    ways: dict[str, Callable[[], list[Call]]] = {}
    if runs <= 64:  # beyond, a mask over every sequence's media is no contender
        ways["dense mask"] = lambda: [load.theirs(contenders.dense_mask, order, prompt)]
        ways["einsum"] = lambda: [load.theirs(contenders.einsum, order, prompt)]
    if len(slots) == runs:
        ways["gather"] = lambda: [load.theirs(contenders.gather, s, load.pages) for s in load.slots]
    if device.type == "cuda":
        for name in ("FA2 varlen of torch", "efficient varlen of torch"):
            ways[name] = partial(_packed, load, name)
    if sizes.compile and runs <= 64 and len(slots) > runs:
        compiled = torch.compile(contenders.einsum)
        ways["einsum, compiled"] = lambda: [load.theirs(compiled, order, prompt)]
        ways["FlexAttention, compiled"] = lambda: [load.theirs(contenders.flex(prompt, order), order, prompt)]
    return ways


def _packed(load: Workload, name: str) -> list[Call]:
    return [load.theirs(contenders.varlen(load.pages, slots)[name], slots, load.pages) for slots in load.slots]


def _time(watch: Stopwatch, calls: Callable[[], list[Call]]) -> Timing:
    return watch.time(calls())


def _fastest(report: Report, watch: Stopwatch, load: Workload, floor: float) -> None:
    """What a row of the launch table is chosen from: the fastest, unless the shipped one is within the noise of it."""
    head_dim = load.spec.media_head_dim
    shipped = launch_config("media", head_dim, DTYPE)
    times: dict[Launch, float] = {}
    for block, stages in itertools.product((16, 32), (2, 3)):  # more rows a tile would change a row's bits
        launch = replace(shipped, block=block, num_stages=stages)
        with launched("media", head_dim, DTYPE, launch):
            who = f"ours, {block} rows, {stages} stages"
            timing = report.timed(STAGE, load.what, who, floor, partial(_time, watch, load.ours))
        if timing is not None:
            times[launch] = timing.microseconds
    best = min(times, key=lambda launch: times[launch], default=shipped)
    if times.get(best, 1.0) < 0.97 * times.get(shipped, 0.0):
        row = {"operator": "media", "architecture": architecture(), "head_dim": head_dim, "dtype": "bfloat16"}
        report.launches.append({**row, **asdict(best)})


def _heads(report: Report, watch: Stopwatch, load: Workload, floor: float) -> None:
    for heads in (1, 2, 4, 8):
        with patch.object(operator, "_heads_per_program", return_value=heads):
            who = f"ours, {heads} heads a program"
            report.timed(STAGE, load.what, who, floor, partial(_time, watch, load.ours))


def _variants(report: Report, watch: Stopwatch, load: Workload, floor: float) -> None:
    """Other ways to write the kernel for decode; where one cannot run, its row says why."""
    for who, variant in VARIANTS.items():
        report.timed(STAGE, load.what, who, floor, partial(_time, watch, partial(load.varied, variant)))


def measure_core(report: Report, watch: Stopwatch, sizes: Sizes, machine: Machine) -> None:
    shapes = [(n, 1) for n in sizes.core_decode] + [(n, sizes.shot_tokens - 1) for n in sizes.prefill]
    for spec in sizes.core:
        for num_tokens, run in shapes:
            load = _workload(spec, sizes, watch.device, num_tokens, run)
            floor = machine.floor(load.num_bytes)
            report.timed(STAGE, load.what, "ours", floor, partial(_time, watch, load.ours))
            for who, calls in _others(load, sizes, watch.device).items():
                report.timed(STAGE, load.what, who, floor, partial(_time, watch, calls))
            if run == 1:
                _variants(report, watch, load, floor)
            if use_triton(load.query) and num_tokens in (sizes.core_decode[-2], sizes.prefill[0]):
                _heads(report, watch, load, floor)
            if use_triton(load.query) and num_tokens == sizes.prefill[0]:
                _fastest(report, watch, load, floor)
