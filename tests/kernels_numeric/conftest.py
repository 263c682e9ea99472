"""The kernels under Triton's interpreter, with bfloat16 repaired, memory poisoned and one tolerance for every machine.

The interpreter (3.6 and 3.9) silently takes bfloat16's bit pattern for its value in `tl.dot` and in casts from integers,
and truncates float32 instead of rounding. Both are repaired here, and arithmetic on bfloat16 is refused. Its fp8 (e4m3)
loses what rounding carries to the exponent, and NaN; torch converts instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

# Triton binds kernels at import to the interpreter or the compiler: these tests need a process of their own
collect_ignore_glob = [] if triton.knobs.runtime.interpret else ["*"]

# the norm of the error over the norm of the result, on inputs rounded to the dtype
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, as the hardware does."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_fp8(values: np.ndarray) -> np.ndarray:
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _widened(handle: Any) -> Any:
    return TensorHandle(to_float32(handle.data), tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle


def _cast(stock: Any) -> Any:
    def cast(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        if source.dtype.scalar == target.scalar:
            return stock(self, source, target, *rounding)
        wide = _widened(source)
        if target.scalar == tl.bfloat16:
            return TensorHandle(to_bfloat16(wide.data.astype(np.float32)), tl.bfloat16)
        if target.scalar == tl.float8e4nv:
            return TensorHandle(to_fp8(wide.data), tl.float8e4nv)
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


if triton.knobs.runtime.interpret:
    repair()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Seed the inputs, use one thread, and fill every tensor that torch leaves uninitialised with NaN."""
    torch.manual_seed(20)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def ordered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `tl.dot` sum every element in one order, as a matrix unit does; numpy's BLAS changes the order with the row."""

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        left, right = (_widened(x).data.astype(np.float32) for x in (a, b))
        total = d.data.copy()
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[None, k]
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that a test has launched so far, in order."""
    names: list[str] = []
    run = InterpretedFunction.run

    def launch(kernel: Any, *args: Any, **options: Any) -> Any:
        names.append(kernel.fn.__name__)
        return run(kernel, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    return names


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.fixture
def close() -> Callable[..., None]:
    """Check a result by `close(name, actual, expected, factor=1)` to the dtype's tolerance; NaN always fails."""

    def check(name: str, actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
        assert actual.shape == expected.shape, f"{name} is {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        error, limit = relative_error(actual, expected), factor * TOLERANCE[actual.dtype]
        assert error <= limit, f"{name}: relative error {error:.2e}, at most {limit:.0e} in {actual.dtype}"

    return check


@pytest.fixture
def gradients() -> Callable[..., tuple[Tensor, ...]]:
    """Compute by `gradients(function, *inputs)` the output and each input's gradient, for a fixed upstream gradient."""

    def run(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    return run
