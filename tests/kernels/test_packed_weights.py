"""Weights in fp8, int8 and int4 and the products with them, by their references; the kernels have suites of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.fp8 import FP8, LARGEST, fp8_linear, quantise_rows
from kernels.weight_only import (
    GROUP,
    int4_linear,
    int8_linear,
    pack_int4,
    quantise_groups,
    quantise_int8,
    unpack_int4_reference,
    unpack_int8_reference,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_four_bits_are_unpacked_to_the_numbers_of_their_groups() -> None:
    weight = torch.randn(48, 192)
    q, constants = quantise_groups(weight)
    scale, zero = constants.float().repeat_interleave(GROUP, 0).unbind(-1)  # [K, N]
    expected = (q.float() - 8) * scale.T + zero.T
    unpacked = unpack_int4_reference(*pack_int4(weight), torch.float32)
    assert torch.equal(unpacked, expected)
    # half a step of 15 between the extremes, and the rounding of both constants
    groups = weight.unflatten(1, (-1, GROUP))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    assert float(((unpacked - weight).unflatten(1, (-1, GROUP)).abs() / step[..., None]).max()) < 0.5 + 15 * 2**-8


def test_four_bits_are_those_of_the_cpu() -> None:
    """The kernel of torch for a CPU, which serves `weight_format: int4` there, reads the same groups."""
    weight, x = torch.randn(32, 128), torch.randn(4, 128).bfloat16()
    q, constants = quantise_groups(weight)
    packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)
    expected = torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, constants)
    assert relative_error(int4_linear(x, *pack_int4(weight)), expected) < 4e-3


def test_eight_bits_are_at_most_half_a_step_off() -> None:
    weight = torch.randn(48, 192) * torch.rand(48, 1)
    weight[5] = 0
    q, scale = quantise_int8(weight)
    unpacked = unpack_int8_reference(q, scale, torch.float32)
    assert float(((unpacked - weight).abs() / scale[:, None]).max()) < 0.501
    assert not unpacked[5].any()
    assert int(q.max()) == 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_the_unpacked_weights(dtype: torch.dtype) -> None:
    weight, x = torch.randn(48, 192), torch.randn(5, 192).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    q, scale = quantise_int8(weight)
    expected = x.double() @ unpack_int8_reference(q, scale, dtype).double().T
    assert relative_error(int8_linear(x, q, scale), expected) < tolerance
    packed, constants = pack_int4(weight)
    expected = x.double() @ unpack_int4_reference(packed, constants, dtype).double().T
    assert relative_error(int4_linear(x, packed, constants), expected) < tolerance


def test_a_row_in_fp8_is_scaled_by_its_largest_number() -> None:
    x = torch.randn(6, 100) * torch.logspace(-6, 6, 6)[:, None]
    x[2] = 0
    rows, scale = quantise_rows(x)
    assert rows.dtype == FP8
    largest = rows.float().abs().amax(1)
    assert largest[2] == 0
    assert (largest[x.any(1)] == LARGEST).all()
    # three bits after the leading one; smaller numbers than 2^-6 have a fixed step of 2^-9
    error = (rows.float() * scale - x).abs()
    assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.001).all()


def test_a_row_in_fp8_does_not_depend_on_its_neighbours() -> None:
    x = torch.randn(5, 64)
    x[1, 3] = 1e6
    together, scales = quantise_rows(x)
    for row in range(5):
        alone, scale = quantise_rows(x[row : row + 1])
        assert torch.equal(alone.view(torch.uint8), together[row : row + 1].view(torch.uint8))
        assert torch.equal(scale, scales[row : row + 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so_alone(value: float) -> None:
    x, weight = torch.randn(3, 64), torch.randn(16, 64)
    x[1, 7] = value
    y = fp8_linear(x, *fp8_weight(weight))
    assert y.isnan().any(1).tolist() == [False, True, False]


def fp8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, scale = quantise_rows(weight)
    return rows, scale.squeeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_in_fp8_is_that_of_the_rounded_numbers(dtype: torch.dtype) -> None:
    weight, x = torch.randn(48, 192), torch.randn(5, 192).to(dtype)
    packed, scale = fp8_weight(weight)
    rows, row_scale = quantise_rows(x)
    expected = (rows.double() * row_scale.double()) @ (packed.double() * scale.double()[:, None]).T
    y = fp8_linear(x, packed, scale)
    assert y.dtype == dtype
    assert relative_error(y, expected) < (1e-6 if dtype == torch.float32 else 4e-3)
    # what rounding to fp8 costs: three bits on both sides
    assert relative_error(y, x.double() @ weight.double().T) < 0.05


@pytest.mark.parametrize("num_rows", [0, 1, 5, 300])
def test_torch_takes_the_layouts_and_scales_of_a_gpus_product(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch checks the arguments of `_scaled_mm` on tensors that pretend to be on a GPU."""
    monkeypatch.setattr("kernels.fp8.use_triton", lambda x: True)
    monkeypatch.setattr("kernels.fp8.quantise_rows", lambda x: (x.to(FP8), x.new_empty(len(x), 1, dtype=torch.float32)))
    with FakeTensorMode():
        x = torch.empty(num_rows, 64, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(48, 64, dtype=FP8, device="cuda")
        y = fp8_linear(x, weight, torch.empty(48, device="cuda"))
        assert y.shape == (num_rows, 48)
        assert y.dtype == torch.bfloat16
