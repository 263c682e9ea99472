"""Compiles the kernels without a GPU, through the functions that launch them, and analyses the binaries.

A stand-in for Triton's driver reports the target; every launch becomes a compilation, so that specialisations (divisible
by 16, equal to 1) are the same as in production. The disassemblers are part of the triton wheel.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

WIDE_COPY = r"\b(?:LDG|LDGSTS)\.[A-Z0-9_.]*128"
WAIT = r"\bACQBULK\b"  # griddepcontrol.wait
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class StandInDriver:
    """The part of a driver that a compilation needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Compiled:
    """The figures of a kernel compiled for one target."""

    name: str
    target: str
    binary: str  # hash of source, options and specialisation
    threads: int
    shared: int  # bytes of shared memory
    spills: int  # bytes of stack and local memory, spilled registers
    registers: int
    tensor_core: int  # matrix instructions
    copies: int  # loads from global memory, of a tile's row or less
    wide_copies: int  # those of 16 bytes per thread
    halfword_copies: int  # those of 2 bytes: a tile that is read element by element
    early_copies: int  # those of 16 bytes that are issued before the first product (NVIDIA)
    copies_in_flight: int  # groups of asynchronous copies that a wait leaves in flight, at most (NVIDIA)
    waits: int  # for the preceding kernel, in a launch that began before its end (NVIDIA)
    copies_before_wait: int  # those of 16 bytes that are issued before the first wait
    stores: int
    wide_stores: int
    layouts: frozenset[str]  # how matrix instructions are distributed over warps: the order of a row's sums


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(BINARIES / tool), *arguments], capture_output=True, text=True, check=True).stdout


def _of_nvidia(kernel: Any, folder: Path, target: str) -> Compiled:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = _run("cuobjdump", "--dump-resource-usage", str(cubin))
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    sass = _run("nvdisasm", "-c", str(cubin))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    first_product = re.search(r"\b(?:HMMA|HGMMA)\b", sass)
    before = sass[: first_product.start() if first_product else None]
    return Compiled(
        name=kernel.metadata.name,
        target=target,
        binary=kernel.hash,
        threads=kernel.metadata.num_warps * TARGETS[target].warp_size,
        shared=kernel.metadata.shared,
        spills=stack + local + count(r"\b(?:LDL|STL)\b"),
        registers=registers,
        tensor_core=count(r"\b(?:HMMA|HGMMA|UTCHMMA|UTC\w*MMA|DMMA)\b"),
        copies=count(r"\b(?:LDG|LDGSTS)\."),
        wide_copies=count(WIDE_COPY),
        early_copies=len(re.findall(WIDE_COPY, before)),
        copies_in_flight=max(map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", kernel.asm["ptx"])), default=0),
        waits=count(WAIT),
        copies_before_wait=len(re.findall(WIDE_COPY, re.split(WAIT, sass)[0])),
        halfword_copies=count(r"\bLDG\.[A-Z0-9_.]*[US]16"),
        stores=count(r"\bSTG\."),
        wide_stores=count(r"\bSTG\.[A-Z0-9_.]*128"),
        layouts=frozenset(re.findall(r"#ttg\.nvidia_mma<\{(.*?)\}>", kernel.asm["ttgir"])),
    )


def _of_amd(kernel: Any, target: str) -> Compiled:
    assembly = kernel.asm["amdgcn"]

    def figure(word: str) -> int:
        return int(re.search(rf"\.{word}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, assembly))

    return Compiled(
        name=kernel.metadata.name,
        target=target,
        binary=kernel.hash,
        threads=kernel.metadata.num_warps * TARGETS[target].warp_size,
        shared=kernel.metadata.shared,
        spills=figure("vgpr_spill_count") + figure("sgpr_spill_count") + figure("private_segment_fixed_size"),
        registers=figure("vgpr_count"),
        tensor_core=count(r"v_mfma"),
        copies=count(r"(?:global|buffer)_load_"),
        wide_copies=count(r"(?:global|buffer)_load_dwordx4"),
        early_copies=0,
        copies_in_flight=0,
        waits=0,
        copies_before_wait=0,
        halfword_copies=count(r"(?:global|buffer)_load_[us]?short"),
        stores=count(r"(?:global|buffer)_store_"),
        wide_stores=count(r"(?:global|buffer)_store_dwordx4"),
        layouts=frozenset(),
    )


def _modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith("kernels.")]


def _kernels() -> list[JITFunction[Any]]:
    values = [value for module in _modules() for value in vars(module).values()]
    return [value for value in values if isinstance(value, JITFunction)]


class Launched(NamedTuple):
    """A launch that became a compilation."""

    kernel: Any
    grid: tuple[int, ...]

    @property
    def programs(self) -> int:
        return prod(self.grid)


@contextmanager
def compiling(target: str) -> Iterator[list[Launched]]:
    """Compile the kernels that the block launches for a target, and yield the list to which each launch is added.

    The tensors may be on any device, including the meta device.
    """
    launched: list[Launched] = []
    run, driver = JITFunction.run, triton.runtime.driver

    def compile_only(self: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append(Launched(run(self, *arguments, grid=grid, warmup=True, **options), grid))

    before = driver._active
    driver.set_active(StandInDriver(TARGETS[target]))
    _forget()
    try:
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(JITFunction, "run", compile_only))
            for module in _modules():
                if hasattr(module, "use_triton"):
                    patches.enter_context(mock.patch.object(module, "use_triton", return_value=True))
            yield launched
    finally:
        driver._active = before
        _forget()  # these binaries are for another target


def read(launched: Iterable[Launched], target: str) -> list[Compiled]:
    """Return the figures of each binary once."""
    binaries = {launch.kernel.hash: launch.kernel for launch in launched}
    with tempfile.TemporaryDirectory() as folder:
        if target.startswith("gfx"):
            return [_of_amd(kernel, target) for kernel in binaries.values()]
        return [_of_nvidia(kernel, Path(folder), target) for kernel in binaries.values()]


def _forget() -> None:
    for function in _kernels():
        function.device_caches.clear()
