"""Integer products on a CPU: packed weights keep their values, and each kernel equals the reference, for any rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import integer_product as module
from kernels.integer_product import (
    IntegerWeights,
    instructions_for,
    integer_product,
    integer_product_reference,
    pack,
    round_rows,
    unpack,
)
from kernels.integer_tile import KNOWN, Instructions, supported
from kernels.weight_only import GROUP, quantise_groups, quantise_int8, unpack_int8_reference

KINDS = [
    pytest.param(
        known, bits, id=f"{known.name}, {bits} bits",
        marks=pytest.mark.skipif(known not in supported(), reason="the processor does not have these instructions"),
    )
    for known in KNOWN for bits in known.bits
]  # fmt: skip
needs_instructions = pytest.mark.skipif(instructions_for(4) is None, reason="the processor has no instructions")


def rows_of(num_rows: int, width: int) -> Tensor:
    """Return rows of different sizes, with a few numbers that are much larger than the others."""
    x = torch.randn(num_rows, width) * 10 ** torch.randn(num_rows, 1)
    x[:, ::37] *= 30
    return x.to(torch.bfloat16)


def default_weights(num_features: int = 48, width: int = 96, bits: int = 4) -> IntegerWeights:
    instructions = instructions_for(bits)
    assert instructions is not None
    return pack(torch.randn(num_features, width), bits, instructions)


@pytest.mark.parametrize(("instructions", "bits"), KINDS)
def test_packed_weights_are_those_of_the_format(instructions: Instructions, bits: int) -> None:
    weight = torch.randn(32, 96)
    unpacked = unpack(pack(weight, bits, instructions))
    if bits == 8:
        assert torch.equal(unpacked, unpack_int8_reference(*quantise_int8(weight), torch.float32))
        return
    q, constants = quantise_groups(weight)
    scale, zero = constants.float().transpose(0, 1).unsqueeze(-1).unbind(2)
    assert torch.equal(unpacked, ((q.unflatten(1, (-1, GROUP)) - 8) * scale + zero).flatten(1))


@pytest.mark.parametrize(("instructions", "bits"), KINDS)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 8, 15, 33])
def test_a_kernel_equals_the_reference(instructions: Instructions, bits: int, num_rows: int) -> None:
    weights, x = pack(torch.randn(48, 96), bits, instructions), rows_of(num_rows, 96)
    actual, expected = integer_product(x, weights), integer_product_reference(x, weights)
    scale = x.float().norm(dim=1, keepdim=True) * math.sqrt(96)
    torch.testing.assert_close(actual / scale, expected / scale, atol=2**-12, rtol=2**-7)


@pytest.mark.parametrize(("instructions", "bits"), KINDS)
def test_the_largest_integers_do_not_overflow(instructions: Instructions, bits: int) -> None:
    """All products have the largest size and one sign, so that each sum within a group is the largest that there is."""
    weight = torch.full((instructions.lanes, 64), 1.0)
    weight[:, ::GROUP] = -1.0  # the smallest of its group, so that the others are the largest integer
    for sign in (1, -1):
        x = torch.full((2, 64), float(sign), dtype=torch.bfloat16)
        weights = pack(weight, bits, instructions)
        torch.testing.assert_close(
            integer_product(x, weights), integer_product_reference(x, weights), atol=0, rtol=2**-8
        )


@needs_instructions
def test_rounding_is_far_below_that_of_bfloat16() -> None:
    x = rows_of(64, 96)
    groups, errors = (y.unflatten(-1, (-1, GROUP)).abs() for y in (x.float(), x.float() - round_rows(x)))
    # half of a unit, of which the largest number has 127 * 256 + 127; float32 rounds the number once more
    assert float((errors / groups.amax(-1, keepdim=True)).max()) < 0.5 / 32639 + 2**-23


@needs_instructions
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_other_rows(bits: int) -> None:
    if instructions_for(bits) is None:
        pytest.skip("the processor has no instructions for 8 bits")
    weights, x = default_weights(bits=bits), rows_of(15, 96)
    alone = torch.cat([integer_product(row[None], weights) for row in x])
    assert torch.equal(integer_product(x, weights), alone)


@needs_instructions
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stays_so_in_its_row_alone(number: float) -> None:
    weights, x = default_weights(), rows_of(3, 96)
    expected = integer_product(x, weights)
    x[1, 40] = number
    actual = integer_product(x, weights)
    assert not bool(actual[1].isfinite().any())
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])


@needs_instructions
@pytest.mark.parametrize("size", [1e-36, 1e-32, 1e-28, 1e30])
def test_groups_of_tiny_and_of_huge_numbers(size: float) -> None:
    """A scale whose inverse would be infinite stands for zeros, also next to groups of usual numbers."""
    weights, x = default_weights(), torch.randn(2, 96)
    x[:, :GROUP] *= size
    actual, expected = (
        integer_product(x.to(torch.bfloat16), weights),
        integer_product_reference(x.to(torch.bfloat16), weights),
    )
    assert bool(actual.isfinite().all())
    torch.testing.assert_close(actual, expected, atol=2**-4 * max(size, 1), rtol=2**-6)


@needs_instructions
def test_zeros_and_a_matrix_that_is_not_contiguous() -> None:
    weights, x = default_weights(), rows_of(4, 192)
    x[0] = 0
    part = x[:, 96:]
    assert not part.is_contiguous()
    assert torch.equal(integer_product(part, weights), integer_product(part.contiguous(), weights))
    assert not bool(integer_product(part, weights)[0].any())


@needs_instructions
@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_number_of_threads_computes_all_features(num_threads: int) -> None:
    weights, x = default_weights(num_features=16 * 7), rows_of(5, 96)
    expected, before = integer_product(x, weights), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(integer_product(x, weights), expected)
    finally:
        torch.set_num_threads(before)


def test_without_threads_or_instructions_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, result in (("has_threads", False), ("supported", [])):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda result=result: result)
            assert instructions_for.__wrapped__(4) is None
