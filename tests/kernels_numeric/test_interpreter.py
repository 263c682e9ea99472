"""The repaired interpreter itself: bfloat16 products, rounding, integers, and the refusal of unsafe arithmetic."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def product(a, b, out):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, 16)
    at = rows[:, None] * 16 + rows[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def convert(source, out):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 256)
    tl.store(out + at, tl.load(source + at).to(out.dtype.element_ty))


@triton.jit
def add(a, out):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 16)
    tl.store(out + at, tl.load(a + at) + tl.load(a + at))


def test_a_product_of_bfloat16_is_computed_from_its_values() -> None:
    a, b = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16)
    product[(1,)](a, b, out)
    torch.testing.assert_close(out, a.float() @ b.float())


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.int8, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_a_cast_rounds_as_torch_does(source: torch.dtype, target: torch.dtype) -> None:
    values = torch.arange(-128, 128) if source == torch.int8 else torch.randn(256) * 100
    values = values.to(source)
    out = torch.empty(256, dtype=target)
    convert[(1,)](values, out)
    assert torch.equal(out.float(), values.to(target).float())


def test_arithmetic_on_bfloat16_is_refused() -> None:
    with pytest.raises(InterpreterError, match="cast to float32"):
        add[(1,)](torch.ones(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16))


def test_memory_that_a_kernel_does_not_write_is_nan() -> None:
    assert torch.randn(3).new_empty(5).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
