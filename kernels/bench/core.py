"""Stage 3: media attention in decode and prefill, compared with its bandwidth bound, other implementations and variants."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from kernels import media_attention_gpu as operator
from kernels.backend import Launch, architecture, launch_config, use_triton
from kernels.bench import contenders
from kernels.bench.correctness import device_tiles, use_launch
from kernels.bench.machine import Machine
from kernels.bench.measure import Call, Report, Stopwatch, Timing
from kernels.bench.sizes import Sizes, Spec
from kernels.bench.variants import VARIANTS, Variant
from kernels.media_attention import media_attention

STAGE = "3 media attention"
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Workload:
    """The inputs of one shape: a query, a pool larger than any cache, and one slot table per launch."""

    case: str
    spec: Spec
    query: Tensor
    pages: Tensor
    slots: list[Tensor]
    num_bytes: float  # moved per launch, at least
    num_prompt_pages: int

    @property
    def scale(self) -> float:
        return float(self.spec.media_head_dim**-0.5)

    def _tables(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(slots, device_tiles(slots, self.spec.media_head_dim, DTYPE)) for slots in self.slots]

    def kernel_calls(self) -> list[Call]:
        return [
            partial(media_attention, self.query, self.pages, slots, scale=self.scale, plan=tiles)
            for slots, tiles in self._tables()
        ]

    def variant_calls(self, variant: Variant) -> list[Call]:
        return [partial(variant, self.query, self.pages, slots, tiles, self.scale) for slots, tiles in self._tables()]

    def contender_call(self, contender: contenders.Contender, slots: Tensor, pages: Tensor) -> Call:
        return partial(contender, self.query, pages, slots, self.scale)


def _pool(spec: Spec, sizes: Sizes, device: torch.device, min_pages: int) -> Tensor:
    page = (spec.media_heads, 2, spec.num_latents, spec.media_head_dim)
    size = 2 * torch.Size(page).numel()
    return torch.randn(max(sizes.pool_bytes // size, min_pages), *page, device=device, dtype=DTYPE)


def _workload(spec: Spec, sizes: Sizes, device: torch.device, num_tokens: int, run: int) -> Workload:
    """Build runs of `run` tokens, each with its own page; decode has runs of one token."""
    num_runs = -(-num_tokens // run)
    pages = _pool(spec, sizes, device, 2 * num_runs)
    query = torch.randn(num_tokens, spec.media_heads, spec.media_head_dim, device=device, dtype=DTYPE)
    slots = []
    for launch in range(sizes.launches):
        run_pages = (torch.randperm(num_runs) + launch * num_runs) % len(pages)
        slots.append(run_pages.repeat_interleave(run)[:num_tokens].to(device, torch.int32))
    page_bytes = 2 * 2 * spec.num_latents * spec.media_inner
    kind = "decode" if run == 1 else "prefill"
    case = f"{spec.name} {kind}, {num_tokens} tokens, {num_runs} pages"
    num_bytes = num_runs * page_bytes + 4.0 * num_tokens * spec.media_inner
    return Workload(case, spec, query, pages, slots, num_bytes, num_runs)


def _contenders(load: Workload, sizes: Sizes, device: torch.device) -> dict[str, Callable[[], list[Call]]]:
    """Return the calls of other implementations: the common ones read the prompt's pages, packed and gather the pool."""
    num_runs = load.num_prompt_pages
    prompt, slots = load.pages[:num_runs].contiguous(), load.slots[0]
    order = torch.unique_consecutive(slots, return_inverse=True)[1].to(torch.int32)
    contender_calls: dict[str, Callable[[], list[Call]]] = {}
    if num_runs <= 64:  # for more, a mask over the media of all sequences is not competitive
        contender_calls["dense mask"] = lambda: [load.contender_call(contenders.dense_mask, order, prompt)]
        contender_calls["einsum"] = lambda: [load.contender_call(contenders.einsum, order, prompt)]
    if len(slots) == num_runs:
        contender_calls["gather"] = lambda: [load.contender_call(contenders.gather, s, load.pages) for s in load.slots]
    if device.type == "cuda":
        for name in ("FA2 varlen of torch", "efficient varlen of torch"):
            contender_calls[name] = partial(_packed, load, name)
    if sizes.compile and num_runs <= 64 and len(slots) > num_runs:
        compiled = torch.compile(contenders.einsum)
        contender_calls["einsum, compiled"] = lambda: [load.contender_call(compiled, order, prompt)]
        contender_calls["FlexAttention, compiled"] = lambda: [
            load.contender_call(contenders.flex(prompt, order), order, prompt)
        ]
    return contender_calls


def _packed(load: Workload, name: str) -> list[Call]:
    return [load.contender_call(contenders.varlen(load.pages, slots)[name], slots, load.pages) for slots in load.slots]


def _time(watch: Stopwatch, calls: Callable[[], list[Call]]) -> Timing:
    return watch.time(calls())


def _fastest(report: Report, watch: Stopwatch, load: Workload, bound: float) -> None:
    """Report the fastest launch as a row of the launch table, unless the shipped one is within the noise."""
    head_dim = load.spec.media_head_dim
    shipped = launch_config("media", head_dim, DTYPE)
    times: dict[Launch, float] = {}
    for block, stages in itertools.product((16, 32), (2, 3)):  # larger tiles would change the bits of a row
        launch = replace(shipped, block=block, num_stages=stages)
        with use_launch("media", head_dim, DTYPE, launch):
            name = f"ours, {block} rows, {stages} stages"
            timing = report.timed(STAGE, load.case, name, bound, partial(_time, watch, load.kernel_calls))
        if timing is not None:
            times[launch] = timing.microseconds
    best = min(times, key=lambda launch: times[launch], default=shipped)
    if times.get(best, 1.0) < 0.97 * times.get(shipped, 0.0):
        row = {"operator": "media", "architecture": architecture(), "head_dim": head_dim, "dtype": "bfloat16"}
        report.launches.append({**row, **asdict(best)})


def _heads(report: Report, watch: Stopwatch, load: Workload, bound: float) -> None:
    for heads in (1, 2, 4, 8):
        with patch.object(operator, "_heads_per_program", return_value=heads):
            name = f"ours, {heads} heads per program"
            report.timed(STAGE, load.case, name, bound, partial(_time, watch, load.kernel_calls))


def _variants(report: Report, watch: Stopwatch, load: Workload, bound: float) -> None:
    """Measure variants of the decode kernel. The row of a variant that cannot run states the reason."""
    for name, variant in VARIANTS.items():
        report.timed(STAGE, load.case, name, bound, partial(_time, watch, partial(load.variant_calls, variant)))


def measure_core(report: Report, watch: Stopwatch, sizes: Sizes, machine: Machine) -> None:
    shapes = [(n, 1) for n in sizes.core_decode] + [(n, sizes.shot_tokens - 1) for n in sizes.prefill]
    for spec in sizes.core:
        for num_tokens, run in shapes:
            load = _workload(spec, sizes, watch.device, num_tokens, run)
            bound = machine.bound(load.num_bytes)
            report.timed(STAGE, load.case, "ours", bound, partial(_time, watch, load.kernel_calls))
            for name, calls in _contenders(load, sizes, watch.device).items():
                report.timed(STAGE, load.case, name, bound, partial(_time, watch, calls))
            if run == 1:
                _variants(report, watch, load, bound)
            if use_triton(load.query) and num_tokens in (sizes.core_decode[-2], sizes.prefill[0]):
                _heads(report, watch, load, bound)
            if use_triton(load.query) and num_tokens == sizes.prefill[0]:
                _fastest(report, watch, load, bound)
