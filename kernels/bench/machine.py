"""Stage 1: the bandwidth and FLOPs of the machine, which define the bounds of the later stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import jit, tl, triton, use_triton
from kernels.bench.journal import Row
from kernels.bench.measure import Result, Stopwatch
from kernels.bench.sizes import Sizes
from kernels.bench.task import Task

STAGE = "1 machine"
READ, NODE = "read", "empty kernel"
YARDSTICKS = (READ, "product")  # the cases that later stages are compared with
CHUNK = 8192  # elements per load of a program


@dataclass(frozen=True, slots=True)
class Machine:
    """The measured speed of the machine."""

    read: float  # bytes per microsecond
    flops: float  # bfloat16 operations per microsecond

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Machine | None:
        """Return the machine of the rows of stage 1, or None if a value is missing."""
        values = {row.unit: row.value for row in rows if row.stage == STAGE and row.case.startswith(YARDSTICKS)}
        read, flops = values.get("GB/s"), values.get("TFLOP/s")
        return None if read is None or flops is None else cls(read * 1e3, flops * 1e6)

    def bound(self, num_bytes: float, flops: float = 0.0) -> float:
        """Return the minimum time in microseconds to read the bytes and compute the operations."""
        return max(num_bytes / self.read, flops / self.flops)


@jit
def _read(x, out, chunks, CHUNK: tl.constexpr):
    """Read memory, 16 bytes per thread, and write one number per program."""
    total = tl.zeros([CHUNK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * chunks * CHUNK
    for chunk in range(0, chunks):
        total += tl.load(x + first + chunk * CHUNK + tl.arange(0, CHUNK))
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def read_all(x: Tensor) -> Tensor:
    if not use_triton(x):
        return x.sum()
    chunks = 8
    out = x.new_empty(triton.cdiv(len(x), chunks * CHUNK))
    _read[(len(out),)](x, out, chunks, CHUNK=CHUNK, num_warps=8)
    return out


def tasks(sizes: Sizes) -> Iterator[Task]:
    product = f"product of {sizes.matmul} x {sizes.matmul}, bfloat16"
    for case, name, measure in (
        (READ, "our kernel", measure_read),
        ("copy, bytes read and written", "torch", measure_copy),
        (product, "torch", measure_product),
        (NODE, "of a graph, or in a loop", measure_node),
    ):
        yield Task(stage=STAGE, case=case, name=name, function=f"{__name__}:{measure.__name__}")


def measure_read(watch: Stopwatch, sizes: Sizes) -> Result:
    x = torch.zeros(sizes.read_bytes // 4, device=watch.device)
    timing = watch.time([lambda: read_all(x)])
    return Result(value=sizes.read_bytes / timing.microseconds / 1e3, unit="GB/s", note=timing.note)


def measure_copy(watch: Stopwatch, sizes: Sizes) -> Result:
    x = torch.zeros(sizes.read_bytes // 4, device=watch.device)
    target = torch.empty_like(x)
    timing = watch.time([lambda: target.copy_(x)])
    return Result(value=2 * sizes.read_bytes / timing.microseconds / 1e3, unit="GB/s", note=timing.note)


def measure_product(watch: Stopwatch, sizes: Sizes) -> Result:
    n = sizes.matmul
    a, b = torch.randn(2, n, n, device=watch.device).bfloat16()
    timing = watch.time([lambda: torch.mm(a, b)])
    return Result(value=2 * n**3 / timing.microseconds / 1e6, unit="TFLOP/s", note=timing.note)


def measure_node(watch: Stopwatch, sizes: Sizes) -> Result:
    element = torch.zeros(1, device=watch.device)
    return Result.of(watch.time([element.zero_] * 100))
