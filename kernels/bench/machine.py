# mypy: disable-error-code="no-untyped-def"
"""Stage 1, the machine's own speed: every percentage of the later stages is of these numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import jit, tl, triton, use_triton
from kernels.bench.measure import Report, Row, Stopwatch
from kernels.bench.sizes import Sizes

STAGE = "1 machine"
CHUNK = 8192  # elements of a program's load


@dataclass(frozen=True, slots=True)
class Machine:
    read: float  # bytes a microsecond
    flops: float  # bfloat16 operations a microsecond
    node: float  # microseconds a kernel of a graph

    def floor(self, num_bytes: float, flops: float = 0.0) -> float:
        return max(num_bytes / self.read, flops / self.flops)


@jit
def _read(x, out, chunks, CHUNK: tl.constexpr):
    """Nothing but reading: 16 bytes a thread, one number written a program."""
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
    one = torch.zeros(1, device=device)
    node = watch.time([one.zero_] * 100).microseconds
    machine = Machine(sizes.read_bytes / read, 2 * n**3 / product, node)
    report.add(Row(STAGE, "read", "our kernel", machine.read / 1e3, "GB/s"))
    report.add(Row(STAGE, "copy, read and written", "torch", 2 * sizes.read_bytes / copy / 1e3, "GB/s"))
    report.add(Row(STAGE, f"product of {n} x {n}, bfloat16", "torch", machine.flops / 1e6, "TFLOP/s"))
    report.add(Row(STAGE, "one empty kernel", "graph" if device.type == "cuda" else "loop", node))
    return machine
