"""The CPU kernels against their references, in each dtype, at odd shapes, with the memory that they must not change."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import compiled as compiled_module
from kernels import paged_attention_cpu
from kernels.backend import select, use_compiled
from kernels.compiled import compiled, compiled_for, load, store
from kernels.decode_attention import decode_attention, decode_attention_reference
from kernels.paged_attention import paged_attention, paged_attention_reference, plan_step
from kernels.paged_attention_cpu import GatherPlan
from kernels.paged_attention_loop import LoopRows
from kernels.rows import (
    add_rms_norm,
    add_rms_norm_reference,
    greedy_argmax,
    greedy_argmax_reference,
    rms_norm,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)
from kernels.self_attention import (
    kv_store,
    kv_store_reference,
    rotary_angles,
    rotate_,
    rotate_and_store,
    rotate_reference,
)

DTYPES = [torch.float32, torch.bfloat16]
# relative to the norm of the result; a bfloat16 has 8 bits
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(6)


def assert_close(got: Tensor, exact: Tensor) -> None:
    """Check a result that was rounded once, from float32."""
    assert got.isfinite().all()
    assert float((got.float() - exact.float()).norm()) <= TOLERANCE[got.dtype] * float(exact.float().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (2, 3, 7), (0, 8)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = 3 * torch.randn(shape).to(dtype), torch.randn(shape[-1])
    assert use_compiled(x, weight)
    assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x.float(), weight, 1e-5))
    assert_close(rms_norm(x, weight.to(dtype), 1e-5), rms_norm_reference(x.float(), weight.to(dtype), 1e-5))
    tiny = torch.full((1, shape[-1]), 1e-4)  # where eps matters
    assert_close(rms_norm(tiny, weight, 1e-5), rms_norm_reference(tiny, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_rotation_changes_the_first_elements_of_each_head_and_nothing_else(rotary_dim: int, dtype: torch.dtype) -> None:
    heads = torch.randn(4, 5, 16).to(dtype)
    cos, sin = (a.to(dtype) for a in rotary_angles(torch.tensor([0, 3, 99, 2]), rotary_dim, 1e4))
    expected = heads.float().clone()
    expected[:, :3] = rotate_reference(heads[:, :3].float(), cos.float(), sin.float())
    assert_close(rotate_(heads[:, :3], cos, sin), expected[:, :3])
    assert torch.equal(heads[:, 3:].float(), expected[:, 3:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    x = 5 * torch.randn(3, 74).to(dtype)
    assert_close(swiglu(x), swiglu_reference(x.float()))
    far = torch.tensor([[-1e4, -100.0, -60.5, 0.0, 90.0, 1e4, *[1.0] * 6]]).to(dtype)
    torch.testing.assert_close(swiglu(far), swiglu_reference(far.float()).to(dtype), atol=1e-20, rtol=1e-2)
    assert bool(swiglu(torch.tensor([[float("nan"), 1.0]]).to(dtype)).isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_store(dtype: torch.dtype) -> None:
    heads = torch.randn(4, 7, 16).to(dtype)
    expected = torch.zeros(5, 2, 2, 4, 16, dtype=dtype)
    got, slots = expected.clone(), torch.tensor([19, -1, 0, 6])
    kv_store_reference(heads[:, 3:5], heads[:, 5:], expected, slots)
    kv_store(heads[:, 3:5], heads[:, 5:], got, slots)
    assert torch.equal(got, expected)
    kv_store(heads[:, 3:5], heads[:, 5:].contiguous(), got.zero_(), slots)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
@pytest.mark.parametrize("queries", [(1, 1, 1), (1, 3, 1), (1, 0, 1)], ids=["decode", "mixed", "absent"])
def test_rows_of_few_tokens_read_their_own_blocks(queries: tuple[int, ...], alibi: bool, dtype: torch.dtype) -> None:
    lengths, table = torch.tensor([11, 3, 14]), torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [1, 2, 5, 6]]).int()
    cache = torch.full((7, 2, 2, 4, 24), float("nan"), dtype=dtype)  # unfilled slots may hold anything
    for blocks, length in zip(table, lengths.tolist(), strict=True):
        for position in range(length):
            cache[blocks[position // 4], :, :, position % 4] = torch.randn(2, 2, 24).to(dtype)
    heads = torch.randn(sum(queries), 7, 24).to(dtype)[:, :6]  # a slice of a fused projection
    slopes, starts = torch.rand(6) if alibi else None, torch.tensor((0, *queries)).cumsum(0).int()
    plan = plan_step(cache, table, starts, lengths, num_tokens=len(heads), num_heads=6, alibi_slopes=slopes)
    assert isinstance(plan, GatherPlan)
    assert plan.only_loop(len(heads)) is not None
    got = paged_attention(heads, cache, table, starts, lengths, scale=0.3, alibi_slopes=slopes, plan=plan)
    exact = paged_attention_reference(
        heads.float(), cache.float(), table, starts, lengths, scale=0.3, alibi_slopes=slopes
    )
    assert_close(got, exact)


def test_a_nan_reaches_only_the_output_of_its_own_row() -> None:
    cache, table = torch.randn(4, 2, 2, 4, 16), torch.tensor([[0, 1], [2, 3]]).int()
    query = torch.randn(2, 2, 16)
    query[1, 0, 3] = float("nan")
    out = paged_attention(query, cache, table, torch.tensor([0, 1, 2]), torch.tensor([7, 8]), scale=0.3)
    assert out[0].isfinite().all()
    assert out[1, 0].isnan().all()
    assert out[1, 1].isfinite().all()


def test_torch_serves_gradients_large_tensors_other_dtypes_and_the_reference() -> None:
    x = torch.randn(2, 8)
    assert use_compiled(x)
    assert not use_compiled(x, torch.ones(8, requires_grad=True))
    assert not use_compiled(x.half())
    assert not use_compiled(torch.empty(1 << 20))
    select("reference")
    try:
        assert not use_compiled(x)
    finally:
        select("auto")
    leaf = x.clone().requires_grad_()
    swiglu(rms_norm(leaf, torch.ones(8), 1e-5)).sum().backward()
    assert leaf.grad is not None


def _double(x: Any, count: Any) -> None:
    for i in range(count):
        store(x, i, load(x, i) + load(x, i))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("cannot cache function: no locator available"), OSError(errno.ENOSPC, "No space left on device")],
    ids=["no folder", "full disk"],
)
def test_a_kernel_compiles_without_a_writable_cache(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any) -> None:
        raise error

    monkeypatch.setattr(compiled_module, "NamedCache", refuse)
    x = torch.tensor([1.0, 2.0, 3.0])
    compiled("T* int")(_double)[x.dtype](x.data_ptr(), 2)
    assert x.tolist() == [2.0, 4.0, 3.0]


def test_each_binary_has_a_file_of_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba would give one number to two binaries of a name that two processes compile at once."""
    monkeypatch.setattr(compiled_module.numba.config, "CACHE_DIR", str(tmp_path))
    for processor in (None, "generic"):
        monkeypatch.setattr(compiled_module.numba.config, "CPU_NAME", processor)
        kernels = compiled_for("T* int")(_multiplied)
        for factor in (2, 3):
            for dtype in DTYPES:
                x = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
                kernels[(factor,)][dtype](x.data_ptr(), 2)
                assert x.tolist() == [factor, 2 * factor, 3]
    assert len(list(tmp_path.rglob("*.nbi"))) == 8
    assert all(file.name.endswith(".1.nbc") for file in tmp_path.rglob("*.nbc"))


def _multiplied(factor: int) -> Callable[..., None]:
    def multiply(x: Any, count: Any) -> None:
        for i in range(count):
            store(x, i, factor * load(x, i))

    return multiply


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_decode_attention_equals_its_three_operators(rotary_dim: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    lengths, table = torch.tensor([11, 1, 16]).int(), torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [1, 2, 5, 6]]).int()
    cache = torch.randn(7, 2, num_kv_heads, 4, 16).to(dtype)
    qkv = torch.randn(3, 5 * num_kv_heads * 16).to(dtype)
    cos, sin = (a.to(dtype) for a in rotary_angles(lengths - 1, rotary_dim, 1e4))
    rows = LoopRows(torch.arange(3).int(), table, lengths, None)
    expected_cache, got_cache = cache.clone(), cache.clone()
    expected = decode_attention_reference(qkv.clone(), cos, sin, expected_cache, rows, 0.3)
    got = decode_attention(qkv.clone(), cos, sin, got_cache, rows, 0.3)
    assert_close(got, expected)
    assert torch.equal(got_cache, expected_cache)
    alone = LoopRows(torch.zeros(1).int(), table[2:], lengths[2:], None)
    assert torch.equal(decode_attention(qkv[2:].clone(), cos[2:], sin[2:], cache.clone(), alone, 0.3), got[2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_rotate_and_store_has_the_bits_of_its_two_steps(rotary_dim: int, dtype: torch.dtype) -> None:
    fused, slots = torch.randn(3, 8, 16).to(dtype), torch.tensor([5, -1, 11])
    cos, sin = (a.to(dtype) for a in rotary_angles(torch.tensor([1, 3, 99]), rotary_dim, 1e4))
    got, expected = torch.zeros(2, 3, 2, 2, 4, 16, dtype=dtype)
    rotated = rotate_(fused[:, :6].clone(), cos, sin)
    kv_store(rotated[:, 4:], fused[:, 6:], expected, slots)
    assert torch.equal(rotate_and_store(fused[:, :6], fused[:, 6:], cos, sin, got, slots), rotated[:, :4])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, branch, weight = torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype), torch.randn(96)
    h, normed = add_rms_norm(x, branch, weight, 1e-5)
    expected, exact = add_rms_norm_reference(x, branch, weight, 1e-5)
    assert torch.equal(h, expected)
    assert_close(normed, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 48, 96, 768, 2048])
def test_the_norm_of_a_sum_has_the_bits_of_its_two_steps(width: int, dtype: torch.dtype) -> None:
    x, branch, weight = torch.randn(5, width).to(dtype), torch.randn(5, width).to(dtype), torch.randn(width)
    h, normed = add_rms_norm(x, branch, weight, 1e-5)
    assert torch.equal(h, x + branch)
    assert torch.equal(normed, rms_norm(x + branch, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_argmax_and_whether_all_logits_are_finite(dtype: torch.dtype) -> None:
    padded = torch.randn(9, 80).to(dtype)
    padded[0, 7] = padded[1, 70] = padded[2, 3] = 9  # the maximum; beyond the end of the row; excluded
    padded[3, 5] = float("nan")
    padded[4, 5] = -torch.tensor(float("nan"))
    padded[5, 3] = float("inf")
    padded[6] = -torch.inf
    padded[7, 5:] = -torch.inf
    padded[8] = -1 - padded[8].abs()
    logits, excluded = padded[:, :67], torch.tensor([3, 66])
    expected, is_finite = greedy_argmax_reference(logits.clone(), excluded)
    token_ids, got_finite = greedy_argmax(logits, excluded)
    assert got_finite.tolist() == is_finite.tolist() == [True] * 3 + [False] * 4 + [True] * 2
    assert torch.equal(token_ids[is_finite], expected[is_finite])
    assert greedy_argmax(logits[:0], excluded)[0].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_argmax_chooses_the_first_zero_whatever_its_sign(dtype: torch.dtype) -> None:
    logits = -torch.rand(4, 50) - 1
    for row, zeros in enumerate(([-0.0, 0.0], [0.0, -0.0], [-0.0, -0.0], [-0.0, -1.0])):
        logits[row, 20], logits[row, 30] = zeros
    excluded = torch.tensor([1])
    assert greedy_argmax_reference(logits.to(dtype), excluded)[0].tolist() == [20] * 4
    assert greedy_argmax(logits.to(dtype), excluded)[0].tolist() == [20] * 4


def test_the_loop_serves_all_decoding_rows_and_few_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, table = torch.randn(6, 2, 2, 4, 16), torch.tensor([[0, 1], [0, 2]]).int()

    def served(starts: list[int], lengths: list[int]) -> bool:
        plan = plan_step(
            cache, table, torch.tensor(starts), torch.tensor(lengths),
            num_tokens=starts[-1], num_heads=2, alibi_slopes=None,
        )  # fmt: skip
        assert isinstance(plan, GatherPlan)
        return plan.only_loop(starts[-1]) is not None

    monkeypatch.setattr(paged_attention_cpu, "MAX_LOOP_PRODUCTS", 2 * 16 * (6 + 7 + 8))
    assert served([0, 1, 2], [8, 7])
    assert served([0, 3, 4], [8, 7])
    monkeypatch.setattr(paged_attention_cpu, "MAX_LOOP_PRODUCTS", 2 * 16 * (6 + 7 + 8) - 1)
    assert served([0, 1, 2], [8, 7])
    assert not served([0, 3, 4], [8, 7])
    monkeypatch.setattr(paged_attention_cpu, "MAX_LOOP_PRODUCTS", 2 * 16 * (6 + 7 + 8))
    monkeypatch.setattr(paged_attention_cpu, "MAX_LOOP_TOKENS", 2)
    assert not served([0, 3, 4], [8, 7])


def test_many_rows_that_share_most_of_many_keys_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = torch.randn(9, 2, 2, 4, 16)

    def is_gathered(table: list[list[int]]) -> bool:
        lengths, starts = torch.full((len(table),), 12), torch.arange(len(table) + 1)
        plan = plan_step(
            cache, torch.tensor(table).int(), starts, lengths,
            num_tokens=len(table), num_heads=2, alibi_slopes=None,
        )  # fmt: skip
        assert isinstance(plan, GatherPlan)
        assert (plan.gathered is None) == (plan.only_loop(len(table)) is not None)
        return plan.gathered is not None

    assert not is_gathered([[0, 1, 2], [0, 1, 3]])
    monkeypatch.setattr(paged_attention_cpu, "MAX_REPEATED_PRODUCTS", 2 * 16 * 8 - 1)
    assert is_gathered([[0, 1, 2], [0, 1, 3]])
    assert not is_gathered([[0, 1, 2]])
    assert not is_gathered([[0, 1, 2], [0, 4, 3]]), "one of three blocks is shared"
    monkeypatch.setattr(paged_attention_cpu, "MAX_REPEATED_PRODUCTS", 2 * 16 * 8)
    assert not is_gathered([[0, 1, 2], [0, 1, 3]])
