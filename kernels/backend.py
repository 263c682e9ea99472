"""Chooses between kernels (Triton on a GPU, Numba on a CPU) and plain torch, and holds the launch table of Triton's.

`select` is called once, at startup. An operator branches only on `use_triton(x)` and, if it has a kernel for the CPU, on
`use_compiled(x)`. A requested backend that cannot run raises an error; there is no fallback to a slower one. The launch
table has a row per operator, architecture, head size and dtype; nothing is tuned while requests run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from kernels.compiled import ELEMENTS, numba

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the kernels stay plain functions that are never called
    triton = tl = None

__all__ = ["numba", "tl", "triton"]

Backend = Literal["auto", "triton", "reference"]


class BackendError(RuntimeError):
    """The requested backend is unknown, is not available here, or does not support this tensor."""


_requested: Backend = "auto"

# for a tensor with more elements, torch's operators, which use all threads, are faster than a loop on one thread
MAX_COMPILED_ELEMENTS = 1 << 19


def has_bfloat16() -> bool:
    """Return whether the CPU has arithmetic in bfloat16: without, torch's products take several times as long.

    oneDNN also supports processors with AVX-512 alone, by emulation.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return not torch.cpu._is_avx512_supported() or torch.cpu._is_avx512_bf16_supported()


class Kernel(Protocol):
    """A Triton kernel: `kernel[grid](...)` launches it; other kernels call it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]: ...

    def __call__(self, *arguments: Any) -> Any: ...


def jit(function: Any) -> Kernel:
    return function if triton is None else triton.jit(function)


def jit_runtime(*names: str) -> Callable[[Any], Kernel]:
    """Return a `jit` that does not specialise a kernel for the values of these arguments.

    Otherwise Triton would compile a kernel again, while a request waits, for a number that is 1 or a multiple of 16, or
    for a table that is not aligned to 16 bytes.
    """
    return lambda function: function if triton is None else triton.jit(do_not_specialize=names)(function)


# whether Triton interprets the kernels on the CPU, for tests (TRITON_INTERPRET=1): it decides this at import, when kernels
# are decorated
INTERPRETING = triton is not None and bool(triton.knobs.runtime.interpret)


def _obstacle() -> str | None:
    """Return why the Triton kernels cannot run in this process, or None."""
    if triton is None:
        return "the package triton is not installed"
    if not INTERPRETING and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def select(backend: Backend) -> None:
    """Choose the backend of the whole process.

    "auto" means Triton for tensors on a GPU. For all others it means Numba if the operator has a kernel, else plain torch.
    Raises `BackendError` if the backend is unknown or cannot run here.
    """
    global _requested
    if backend not in get_args(Backend):
        raise BackendError(f"backend {backend!r} is not one of {', '.join(get_args(Backend))}")
    if backend == "triton" and (obstacle := _obstacle()):
        raise BackendError(f"backend 'triton' was requested, but {obstacle}")
    _requested = backend


def runs_triton() -> bool:
    """Return whether the Triton kernels are used for tensors on a GPU."""
    return _requested != "reference" and _obstacle() is None


def runs_numba() -> bool:
    """Return whether kernels that Numba compiles are used for tensors on a CPU."""
    return _requested != "reference" and numba is not None


def use_triton(x: Tensor) -> bool:
    if _requested == "reference" or (_requested == "auto" and not x.is_cuda and not INTERPRETING):
        return False
    runs = _obstacle() is None and (x.is_cuda or INTERPRETING)
    if _requested == "triton" and not runs:
        raise BackendError(f"backend 'triton' was requested, but a tensor is on {x.device}")
    return runs


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Return whether these tensors need a backward pass, which the kernels of some operators do not have."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def use_compiled(*tensors: Tensor) -> bool:
    """Return whether to use the CPU kernels: for a small first tensor of a supported dtype, if no gradient is needed."""
    if not runs_numba() or needs_gradients(*tensors):
        return False
    x = tensors[0]
    return x.is_cpu and x.dtype in ELEMENTS and x.numel() <= MAX_COMPILED_ELEMENTS


def _reason() -> str:
    if _requested == "reference":
        return "requested"
    return _obstacle() or ("interpreted, for tests" if INTERPRETING else "torch sees a GPU")


def describe() -> dict[str, Any]:
    """Describe the choice, for the log at startup, /health and /version."""
    on_cpu = "numba" if runs_numba() else "reference"
    return {
        "requested": _requested,
        "backend": "triton" if runs_triton() else on_cpu,
        "reason": _reason(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton is not None else None,
        "numba": numba.__version__ if numba is not None else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


@dataclass(frozen=True, slots=True)
class Launch:
    block: int  # rows per program
    num_warps: int
    num_stages: int  # loads in flight

    @property
    def options(self) -> dict[str, Any]:
        # fusing multiply and add is no longer the default from Triton 3.10 on
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# The defaults for every architecture, head size and dtype without a row: shapes that compile everywhere without spills, in
# the 64 KiB of shared memory of gfx942. Media attention has only its default: more rows per tile do not make it faster, and
# would change the order of its sums between decode and prefill.
DEFAULTS = {
    "media": Launch(16, 4, 2),
    "media_backward": Launch(16, 4, 1),
    "resampler": Launch(16, 4, 2),
    "resampler_backward": Launch(16, 4, 1),
    "paged_prefill": Launch(16, 4, 2),
    "paged_decode": Launch(16, 4, 2),
    "paged_offsets": Launch(16, 4, 2),  # prefill and decode of models whose keys have offsets
    "row": Launch(1, 4, 1),
    # products with packed weights, of few rows and of more: about 20 KiB of weights are in flight per multiprocessor
    "int8": Launch(16, 4, 6),
    "int8_many": Launch(64, 4, 3),
    "int4": Launch(16, 4, 8),
    "int4_many": Launch(64, 4, 3),
}

NVIDIA = ("sm_80", "sm_90", "sm_100")
HALF = ("bfloat16", "float16")
SHIPPED: tuple[tuple[str, tuple[str, ...], tuple[int, ...], tuple[str, ...], Launch], ...] = (
    # operator, architectures, head sizes, dtypes, launch
    ("resampler", NVIDIA, (64,), HALF, Launch(64, 4, 1)),
    ("resampler", NVIDIA[1:], (96,), HALF, Launch(64, 4, 1)),  # on sm_80, which has no wgmma, this spills
    ("resampler_backward", NVIDIA, (64,), HALF, Launch(64, 4, 1)),
    ("resampler_backward", NVIDIA[1:], (96,), HALF, Launch(64, 4, 1)),
    ("paged_decode", NVIDIA, (64, 80, 128), HALF, Launch(16, 4, 3)),  # two steps of keys and values in flight
    ("paged_prefill", NVIDIA, (64,), HALF, Launch(64, 4, 2)),
    ("paged_prefill", NVIDIA[:2], (80, 128), HALF, Launch(64, 8, 2)),  # 4 warps would use every register
    ("paged_offsets", NVIDIA[:1], (80,), HALF, Launch(16, 4, 3)),  # 2 stages would spill
    ("paged_prefill", NVIDIA[2:], (80, 128), HALF, Launch(64, 8, 3)),  # 2 stages, compiled otherwise there, would spill
)

Key = tuple[str, str, int, str]  # operator, architecture, head size, dtype
TABLE: dict[Key, Launch] = {
    (operator, architecture, head_dim, dtype): launch
    for operator, architectures, head_dims, dtypes, launch in SHIPPED
    for architecture, head_dim, dtype in itertools.product(architectures, head_dims, dtypes)
}


def architecture() -> str:
    """Return the GPU's architecture (sm_90, gfx942, ...); under the interpreter, a name that has only defaults."""
    return "interpreter" if INTERPRETING else _architecture_of(triton.runtime.driver.active)


@cache  # called at every launch
def _architecture_of(driver: Any) -> str:
    target = driver.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def launch_config(operator: str, head_dim: int, dtype: torch.dtype) -> Launch:
    key = (operator, architecture(), head_dim, str(dtype).removeprefix("torch."))
    return TABLE.get(key, DEFAULTS[operator])
