"""Stage 3: media attention in decode and prefill, compared with its bandwidth bound, other implementations and variants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from kernels import media_attention_gpu as operator
from kernels.bench import contenders
from kernels.bench.correctness import device_tiles
from kernels.bench.measure import Call, Result, Stopwatch
from kernels.bench.sizes import Sizes, Spec
from kernels.bench.task import Task
from kernels.bench.variants import VARIANTS, Variant
from kernels.media_attention import media_attention

STAGE = "3 media attention"
DTYPE = torch.bfloat16
COMPILED = ", compiled"
FLEX = f"FlexAttention{COMPILED}"
HEADS = {f"ours, {heads} heads per program": heads for heads in (1, 2, 4, 8)}


@dataclass(frozen=True, slots=True)
class Workload:
    """The inputs of one shape: a query, a pool larger than any cache, and one slot table per launch."""

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

    def contender_calls(self, name: str) -> list[Call]:
        """Return the calls of another implementation.

        Most read the prompt's pages. Those that need no copy of the pages, and `gather`, cycle through the pool.
        """
        if name in contenders.VARLEN or name == "gather":
            return [self._call(self._of_pool(name, slots), slots, self.pages) for slots in self.slots]
        prompt = self.pages[: self.num_prompt_pages].contiguous()
        order = torch.unique_consecutive(self.slots[0], return_inverse=True)[1].to(torch.int32)
        if name == FLEX:
            return [self._call(contenders.flex(prompt, order), order, prompt)]
        plain = contenders.PLAIN[name.removesuffix(COMPILED)]
        return [self._call(torch.compile(plain) if name.endswith(COMPILED) else plain, order, prompt)]

    def _of_pool(self, name: str, slots: Tensor) -> contenders.Contender:
        return contenders.gather if name == "gather" else contenders.varlen(self.pages, slots)[name]

    def _call(self, contender: contenders.Contender, slots: Tensor, pages: Tensor) -> Call:
        return partial(contender, self.query, pages, slots, self.scale)


def _pool(spec: Spec, sizes: Sizes, device: torch.device, min_pages: int) -> Tensor:
    page = (spec.media_heads, 2, spec.num_latents, spec.media_head_dim)
    size = 2 * torch.Size(page).numel()
    return torch.randn(max(sizes.pool_bytes // size, min_pages), *page, device=device, dtype=DTYPE)


def case(spec: Spec, num_tokens: int, run: int) -> str:
    return f"{spec.name} {'decode' if run == 1 else 'prefill'}, {num_tokens} tokens, {-(-num_tokens // run)} pages"


def workload(spec: Spec, sizes: Sizes, device: torch.device, num_tokens: int, run: int) -> Workload:
    """Build runs of `run` tokens, each with its own page; decode has runs of one token."""
    num_runs = -(-num_tokens // run)
    pages = _pool(spec, sizes, device, 2 * num_runs)
    query = torch.randn(num_tokens, spec.media_heads, spec.media_head_dim, device=device, dtype=DTYPE)
    slots = []
    for launch in range(sizes.launches):
        run_pages = (torch.randperm(num_runs) + launch * num_runs) % len(pages)
        slots.append(run_pages.repeat_interleave(run)[:num_tokens].to(device, torch.int32))
    page_bytes = 2 * 2 * spec.num_latents * spec.media_inner
    num_bytes = num_runs * page_bytes + 4.0 * num_tokens * spec.media_inner
    return Workload(spec, query, pages, slots, num_bytes, num_runs)


def _names(sizes: Sizes, num_tokens: int, run: int, *, is_gpu: bool) -> list[str]:
    """Return the names of the implementations that are measured for a shape."""
    num_runs, is_decode = -(-num_tokens // run), run == 1
    names = ["ours"]
    if num_runs <= 64:  # for more, a mask over the media of all sequences is not competitive
        names += ["dense mask", "einsum"]
    names += ["gather"] if is_decode else []
    names += [*contenders.VARLEN] if is_gpu else []
    if sizes.compile and num_runs <= 64 and not is_decode:
        names += [f"einsum{COMPILED}", FLEX]
    names += [*VARIANTS] if is_decode else []
    if is_gpu and num_tokens in (sizes.core_decode[-2], sizes.prefill[0]):
        names += [*HEADS]
    return names


def tasks(sizes: Sizes, *, is_gpu: bool) -> Iterator[Task]:
    shapes = [(n, 1) for n in sizes.core_decode] + [(n, sizes.shot_tokens - 1) for n in sizes.prefill]
    for spec in sizes.core:
        for num_tokens, run in shapes:
            for name in _names(sizes, num_tokens, run, is_gpu=is_gpu):
                yield Task(
                    stage=STAGE,
                    case=case(spec, num_tokens, run),
                    name=name,
                    function=f"{__name__}:measure",
                    arguments={"spec": spec.name, "num_tokens": num_tokens, "run": run, "name": name},
                    max_seconds=240 if name.endswith(COMPILED) else 90,
                )


def measure(watch: Stopwatch, sizes: Sizes, *, spec: str, num_tokens: int, run: int, name: str) -> Result:
    load = workload(sizes.spec(spec), sizes, watch.device, num_tokens, run)
    if name in HEADS:
        with patch.object(operator, "_heads_per_program", return_value=HEADS[name]):
            return Result.of(watch.time(load.kernel_calls()), load.num_bytes)
    if name == "ours":
        calls = load.kernel_calls()
    elif name in VARIANTS:
        calls = load.variant_calls(VARIANTS[name])
    else:
        calls = load.contender_calls(name)
    return Result.of(watch.time(calls), load.num_bytes)
