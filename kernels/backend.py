"""The one place that chooses between the kernels (Triton's on a GPU, Numba's on a processor) and plain torch, and says so.

`select` is called once, at start; `use_triton(x)`, and `use_compiled(x)` where a processor has a kernel, are an operator's
only `if`s. A kernel that was asked for and cannot run raises: it never quietly becomes slow.
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
except ImportError:  # no wheel for this platform: the kernels stay plain functions that nobody calls
    triton = tl = None

__all__ = [
    "BackendError",
    "Kernel",
    "describe",
    "interpreting",
    "jit",
    "jit_runtime",
    "numba",
    "select",
    "tl",
    "triton",
    "use_compiled",
    "use_triton",
]

Backend = Literal["auto", "triton", "reference"]


class BackendError(RuntimeError):
    """The backend that was asked for does not exist here, or cannot take the tensor that it was handed."""


_requested: Backend = "auto"

# elements of a tensor from which on torch's operators, which share them among threads, beat a loop on one
MOST = 1 << 19


class Kernel(Protocol):
    """A Triton kernel: `kernel[grid](...)` starts it; other kernels call it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]: ...

    def __call__(self, *arguments: Any) -> Any: ...


def jit(function: Any) -> Kernel:
    return function if triton is None else triton.jit(function)


def jit_runtime(*names: str) -> Callable[[Any], Kernel]:
    """As `jit`, for a kernel that must not be compiled anew, while a request waits, where one of these arguments is 1, a
    multiple of 16, or a table out of step with 16 bytes."""
    return lambda function: function if triton is None else triton.jit(do_not_specialize=names)(function)


# Triton decides at import, when kernels are decorated
INTERPRETING = triton is not None and bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """TRITON_INTERPRET=1: the kernels run on the CPU, statement by statement, for the tests."""
    return INTERPRETING


def _obstacle() -> str | None:
    """Why the Triton kernels cannot run in this process."""
    if triton is None:
        return "the package triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def select(backend: Backend) -> None:
    """Choose for the whole process. "auto" takes Triton for tensors on a GPU, and for all others
    Numba where it has a kernel, or plain torch."""
    global _requested
    if backend not in get_args(Backend):
        raise BackendError(f"backend {backend!r} is none of {', '.join(get_args(Backend))}")
    if backend == "triton" and (obstacle := _obstacle()):
        raise BackendError(f"the Triton kernels were asked for, but {obstacle}")
    _requested = backend


def use_triton(x: Tensor) -> bool:
    if _requested == "reference" or (_requested == "auto" and not x.is_cuda and not INTERPRETING):
        return False
    runs = _obstacle() is None and (x.is_cuda or interpreting())
    if _requested == "triton" and not runs:
        raise BackendError(f"the Triton kernels were asked for, but were handed a tensor on {x.device}")
    return runs


def use_compiled(*tensors: Tensor) -> bool:
    """Whether the kernels for a processor serve: the first tensor is small, of a dtype that they know, and no gradient of
    any is wanted."""
    if _requested == "reference" or numba is None:
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    x = tensors[0]
    return x.is_cpu and x.dtype in ELEMENTS and x.numel() <= MOST


def _reason() -> str:
    if _requested == "reference":
        return "asked for"
    return _obstacle() or ("interpreted, for tests" if interpreting() else "a GPU is there")


def describe() -> dict[str, Any]:
    """For the log at start, /health and /version."""
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
