"""Repairs bfloat16 in Triton's interpreter, which computes it wrongly and in silence (seen with 3.6 and 3.9).

tl.dot and casts from integers take the bit pattern for the value, float32 is truncated instead of rounded; both are
set right. Arithmetic on bfloat16 itself is refused: a kernel casts to float32 first, as it must for its accuracy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, as the hardware does."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _widened(handle: Any) -> Any:
    return TensorHandle(to_float32(handle.data), tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle


def _cast(stock: Any) -> Any:
    def cast(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        if source.dtype.scalar == target.scalar:
            return stock(self, source, target, *rounding)
        wide = _widened(source)
        if target.scalar == tl.bfloat16:
            return TensorHandle(to_bfloat16(wide.data.astype(np.float32)), tl.bfloat16)
        if wide is not source and target.scalar == tl.float32:
            return wide
        return stock(self, wide, target, *rounding)

    return cast


def _refused(name: str, stock: Any) -> Any:
    def binary(self: Any, left: Any, right: Any) -> Any:
        if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
            raise TypeError(f"{name} on bfloat16: cast to float32 in the kernel")
        return stock(self, left, right)

    return binary


def repair() -> None:
    dot = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, _widened(a), _widened(b), *rest)
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, _cast(getattr(InterpreterBuilder, name)))
    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_precise_divf"):
        setattr(InterpreterBuilder, name, _refused(name, getattr(InterpreterBuilder, name)))


# the kernels are read at import for the interpreter or for the compiler: these tests have a process of their own
collect_ignore_glob = [] if triton.knobs.runtime.interpret else ["*"]
if triton.knobs.runtime.interpret:
    repair()
