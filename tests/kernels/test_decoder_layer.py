"""A whole decoder layer in one call equals its parts: any rows, contexts, spans and threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.decoder_layer import LayerWeights, decoder_layer, decoder_layer_reference
from kernels.integer_product import IntegerWeights, instructions_for, pack
from kernels.integer_tile import Instructions
from kernels.paged_attention_loop import LoopRows
from kernels.spans import Offsets, Spans
from tests.kernels.test_integer_product import KINDS, needs_instructions

DIM, HEADS, KV_HEADS, HEAD_DIM, FFN_DIM, BLOCK_SIZE = 96, 6, 2, 16, 160, 4


def layer(instructions: Instructions, bits: int = 4) -> LayerWeights:
    def matrix(features: int, width: int) -> IntegerWeights:
        return pack(torch.randn(features, width) / width**0.5, bits, instructions)

    return LayerWeights(
        matrix((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM),
        matrix(DIM, HEADS * HEAD_DIM),
        matrix(2 * FFN_DIM, DIM),
        matrix(DIM, FFN_DIM),
        torch.rand(DIM) + 0.5,
        torch.rand(DIM) + 0.5,
        torch.tensor([1e-5, 1e-6, HEAD_DIM**-0.5]),
    )


def step(lengths: list[int], *, is_one_sequence: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, LoopRows]:
    """Return x, cos, sin, a cache of random numbers, and a plan of rows with this many slots."""
    num_rows, width = len(lengths), -(-max(lengths) // BLOCK_SIZE)
    num_tables = 1 if is_one_sequence else num_rows
    tables = torch.randperm(num_tables * width).view(num_tables, width).int()
    cache = torch.randn(num_tables * width, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM).to(torch.bfloat16)
    angles = torch.rand(num_rows, 1, HEAD_DIM) * 6
    x = torch.randn(num_rows, DIM).to(torch.bfloat16)
    plan = LoopRows(
        torch.arange(num_rows).int(), tables.expand(num_rows, width).contiguous(), torch.tensor(lengths).int(), None
    )
    return x, angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16), cache, plan


def check(weights: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, plan: LoopRows) -> None:
    expected_cache = cache.clone()
    expected = decoder_layer_reference(x, cos, sin, expected_cache, plan, weights)
    actual = decoder_layer(x, cos, sin, cache, plan, weights)
    assert torch.equal(actual, expected), "these sizes of heads are summed in one order"
    assert torch.equal(cache, expected_cache)
    assert bool(actual.isfinite().all())


@pytest.mark.parametrize(("instructions", "bits"), KINDS)
@pytest.mark.parametrize("lengths", [[1], [9], [3, 12], [1, 7, 8, 30, 2, 5, 16, 4, 11]], ids=str)
@torch.inference_mode()
def test_a_layer_equals_its_parts(instructions: Instructions, bits: int, lengths: list[int]) -> None:
    check(layer(instructions, bits), *step(lengths))


@needs_instructions
@torch.inference_mode()
def test_later_rows_of_a_sequence_read_the_keys_of_earlier_ones() -> None:
    instructions = instructions_for(4)
    assert instructions is not None
    check(layer(instructions), *step([8, 9, 10, 11], is_one_sequence=True))


@needs_instructions
@pytest.mark.parametrize("has_offsets", [False, True])
@torch.inference_mode()
def test_contexts_of_several_spans(has_offsets: bool) -> None:
    instructions = instructions_for(4)
    assert instructions is not None
    x, cos, sin, cache, plan = step([12, 11])
    offsets = torch.tensor([[2, 0, 0], [0, 3, 0]]).int()
    spans = Spans(
        torch.tensor([9, 8]).int(),
        torch.tensor([[0, 4, 7], [0, 4, 6]]).int(),
        torch.tensor([[4, 3, 4], [4, 2, 3]]).int(),
        Offsets.of(offsets, HEAD_DIM, 10_000.0, 64) if has_offsets else None,
    )
    check(layer(instructions), x, cos, sin, cache, LoopRows(plan.rows, plan.tables, plan.lengths, None, spans))


@needs_instructions
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@torch.inference_mode()
def test_any_number_of_threads_computes_the_layer(num_threads: int) -> None:
    instructions, before = instructions_for(4), torch.get_num_threads()
    assert instructions is not None
    weights, arguments = layer(instructions), step([5, 9, 2])
    torch.set_num_threads(num_threads)
    try:
        for _ in range(50):  # threads in any order
            check(weights, *arguments)
    finally:
        torch.set_num_threads(before)
