"""The choice between the kernels (Triton on a GPU, Numba on a CPU) and plain torch.

`select` is called once, at start. `use_triton(x)`, and `use_compiled(x)` where an operator has a kernel for the CPU, are an
operator's only branches. A requested backend that cannot run raises; it never falls back to a slower one.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """The requested backend does not exist here, or cannot take this tensor."""


_requested: Backend = "auto"

# elements of a tensor, beyond which torch's operators, which use all threads, beat a loop on one
MAX_COMPILED_ELEMENTS = 1 << 19


class Kernel(Protocol):
    """A Triton kernel: `kernel[grid](...)` launches it; other kernels call it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]: ...

    def __call__(self, *arguments: Any) -> Any: ...


def jit(function: Any) -> Kernel:
    return function if triton is None else triton.jit(function)


def jit_runtime(*names: str) -> Callable[[Any], Kernel]:
    """Return a `jit` that does not specialise a kernel for the values of these arguments.

    Otherwise a kernel would be compiled again, while a request waits, for a number that is 1 or a multiple of 16, or for
    a table that is not aligned to 16 bytes.
    """
    return lambda function: function if triton is None else triton.jit(do_not_specialize=names)(function)


# Triton decides at import, when kernels are decorated
INTERPRETING = triton is not None and bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """Return whether the kernels run on the CPU, statement by statement, for the tests (TRITON_INTERPRET=1)."""
    return INTERPRETING


def _obstacle() -> str | None:
    """Return why the Triton kernels cannot run in this process, or None."""
    if triton is None:
        return "the package triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def select(backend: Backend) -> None:
    """Choose the backend of the whole process.

    "auto" takes Triton for tensors on a GPU; for all others it takes Numba where an operator has a kernel, and plain torch
    elsewhere. Raises `BackendError` if the backend is unknown or cannot run here.
    """
    global _requested
    if backend not in get_args(Backend):
        raise BackendError(f"backend {backend!r} is none of {', '.join(get_args(Backend))}")
    if backend == "triton" and (obstacle := _obstacle()):
        raise BackendError(f"backend 'triton' was requested, but {obstacle}")
    _requested = backend


def use_triton(x: Tensor) -> bool:
    if _requested == "reference" or (_requested == "auto" and not x.is_cuda and not INTERPRETING):
        return False
    runs = _obstacle() is None and (x.is_cuda or interpreting())
    if _requested == "triton" and not runs:
        raise BackendError(f"backend 'triton' was requested, but a tensor is on {x.device}")
    return runs


def use_compiled(*tensors: Tensor) -> bool:
    """Return whether the CPU kernels serve: a small first tensor of a dtype that they know, and no gradients."""
    if _requested == "reference" or numba is None:
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    x = tensors[0]
    return x.is_cpu and x.dtype in ELEMENTS and x.numel() <= MAX_COMPILED_ELEMENTS


def _reason() -> str:
    if _requested == "reference":
        return "requested"
    return _obstacle() or ("interpreted, for tests" if interpreting() else "torch sees a GPU")


def describe() -> dict[str, Any]:
    """Describe the choice for the log at start, /health and /version."""
    triton_runs = _requested != "reference" and _obstacle() is None
    on_cpu = "reference" if _requested == "reference" or numba is None else "numba"
    return {
        "requested": _requested,
        "backend": "triton" if triton_runs else on_cpu,
        "reason": _reason(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton is not None else None,
        "numba": numba.__version__ if numba is not None else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
