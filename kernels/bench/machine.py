"""Stage 1: the bandwidth and FLOPs of the machine, which define the bounds of the later stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import jit, tl, triton, use_triton
from kernels.bench.measure import Report, Row, Stopwatch
from kernels.bench.sizes import Sizes

STAGE = "1 machine"
CHUNK = 8192  # elements per load of a program


@dataclass(frozen=True, slots=True)
class Machine:
    """The measured speed of the machine."""

    read: float  # bytes per microsecond
    flops: float  # bfloat16 operations per microsecond
    node: float  # microseconds per kernel of a graph

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


def measure_machine(report: Report, watch: Stopwatch, sizes: Sizes) -> Machine:
    device, n = watch.device, sizes.matmul
    x = torch.zeros(sizes.read_bytes // 4, device=device)
    read = watch.time([lambda: read_all(x)]).microseconds
    target = torch.empty_like(x)
    copy = watch.time([lambda: target.copy_(x)]).microseconds
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    product = watch.time([lambda: torch.mm(a, b)]).microseconds
    element = torch.zeros(1, device=device)
    node = watch.time([element.zero_] * 100).microseconds
    machine = Machine(sizes.read_bytes / read, 2 * n**3 / product, node)
    report.add(Row(STAGE, "read", "our kernel", machine.read / 1e3, "GB/s"))
    report.add(Row(STAGE, "copy, bytes read and written", "torch", 2 * sizes.read_bytes / copy / 1e3, "GB/s"))
    report.add(Row(STAGE, f"product of {n} x {n}, bfloat16", "torch", machine.flops / 1e6, "TFLOP/s"))
    report.add(Row(STAGE, "empty kernel", "graph" if device.type == "cuda" else "loop", node))
    return machine
