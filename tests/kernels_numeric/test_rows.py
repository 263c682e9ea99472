"""The kernels that work row by row, against their references: gates, norms, SwiGLU, rotation, and the cache's store."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.rows import (
    add_layer_norm,
    add_layer_norm_reference,
    add_linear_,
    add_linear_reference,
    add_rms_norm,
    add_rms_norm_reference,
    gated_residual,
    gated_residual_reference,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
    swiglu,
    swiglu_reference,
)
from kernels.self_attention import (
    kv_store,
    kv_store_reference,
    rotary_angles,
    rotate_and_store,
    rotate_and_store_reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Check = Callable[..., None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_width", [1, 1100], ids=["scalar", "channel"])
def test_gated_residual(
    gate_width: int, dtype: torch.dtype, close: Check, gradients: Callable[..., list[Tensor]]
) -> None:
    x, branch = torch.randn(2, 37, 1100).to(dtype)
    inputs = (x, branch, torch.randn(gate_width).to(dtype))
    actual = gradients(gated_residual, *inputs)
    expected = gradients(gated_residual_reference, *(x.float() for x in inputs))
    for name, got, want in zip(("out", "x", "branch", "gate"), actual, expected, strict=True):
        close(name, got, want, factor=3 if name == "gate" else 1)


def test_a_closed_gate_leaves_the_language_model_unchanged() -> None:
    x, branch = torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(gated_residual(x, branch, torch.zeros(1, dtype=torch.bfloat16)), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (2, 3, 40)], ids=str)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, close: Check) -> None:
    x = (3 + torch.randn(shape)).to(dtype)
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    wide = (x.float(), weight.float())
    close("rms", rms_norm(x, weight, 1e-5), rms_norm_reference(*wide, 1e-5))
    close("layer", layer_norm(x, weight, bias, 1e-5), layer_norm_reference(*wide, bias.float(), 1e-5))
    close("no bias", layer_norm(x, weight, None, 1e-5), layer_norm_reference(*wide, None, 1e-5))
    columns = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(rms_norm(columns, weight, 1e-5), rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (2, 3, 40), (0, 8)], ids=str)
def test_norms_of_sums(shape: tuple[int, ...], dtype: torch.dtype, close: Check, launches: list[str]) -> None:
    x, branch = (3 + torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    results = [
        add_rms_norm(x, branch, weight, 1e-5),
        add_layer_norm(x, branch, weight, bias, 1e-5),
        add_layer_norm(x, branch, weight, None, 1e-5),
    ]
    assert launches == ["_add_norm_row"] * 3
    exact, wide = ((x + branch).float(), torch.zeros(shape)), weight.float()
    references = [
        add_rms_norm_reference(*exact, wide, 1e-5),
        add_layer_norm_reference(*exact, wide, bias.float(), 1e-5),
        add_layer_norm_reference(*exact, wide, None, 1e-5),
    ]
    for (total, normed), (_, expected) in zip(results, references, strict=True):
        assert torch.equal(total, x + branch)
        close("norm", normed, expected)
    columns = branch.transpose(0, -1).contiguous().transpose(0, -1)
    for got, want in zip(add_rms_norm(x, columns, weight, 1e-5), results[0], strict=True):
        assert torch.equal(got, want)


def test_the_norm_of_a_sum_is_that_of_the_rounded_sum(close: Check) -> None:
    x, branch = (256 + torch.randn(3, 48)).bfloat16(), torch.randn(3, 48).bfloat16()
    weight = torch.randn(48)  # of another dtype
    total, normed = add_layer_norm(x, branch, weight, None, 1e-5)
    assert torch.equal(total, x + branch)
    close("norm", normed, layer_norm_reference((x + branch).float(), weight, None, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 4300), (2, 3, 74), (0, 8)], ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, close: Check, launches: list[str]) -> None:
    x = 5 * torch.randn(shape).to(dtype)
    expected = swiglu_reference(x.float())
    close("out", swiglu(x), expected)
    close("of columns", swiglu(x.transpose(0, -1).contiguous().transpose(0, -1)), expected)
    assert launches == ["_swiglu_block"] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy; a GPU gives infinity
def test_swiglu_of_large_gates_is_zero_or_the_product(dtype: torch.dtype, close: Check) -> None:
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, *[2.0] * 5]]).to(dtype)
    close("out", swiglu(x), torch.tensor([[0.0, 0.0, 0.0, 200.0, 2e4]]))
    assert bool(swiglu(torch.tensor([[float("nan"), 1.0]]).to(dtype)).isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_added_in_place_where_nothing_else_is_computed(dtype: torch.dtype, close: Check) -> None:
    h, x, weight, bias = (torch.randn(shape).to(dtype) for shape in [(5, 24), (5, 40), (24, 40), (24,)])
    before, expected = h.clone(), add_linear_reference(h.float(), x.float(), weight.float(), None)
    assert torch.equal(add_linear_(h, x, weight, bias), add_linear_reference(h, x, weight, bias))
    leaf = weight.clone().requires_grad_()
    assert add_linear_(h, x, leaf, None).requires_grad
    assert torch.equal(h, before)
    close("out", add_linear_(h, x, weight, None), expected)
    close("in place", h, expected)


def test_torch_serves_gradients(launches: list[str]) -> None:
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(16)
    h, normed = add_rms_norm(x.detach(), x, weight, 1e-5)
    h, centred = add_layer_norm(h, normed, weight, weight, 1e-5)
    (h + centred).sum().backward()
    swiglu(x).sum().backward()
    assert x.grad is not None
    assert not launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_store(dtype: torch.dtype) -> None:
    fused = torch.randn(6, 9, 20).to(dtype)
    key, value = fused[:, 3:6], fused[:, 6:]
    slots = torch.tensor([3, -1, 17, 35, 0, 8])
    actual = torch.full((9, 2, 3, 4, 20), -1.0, dtype=dtype)
    expected = actual.clone()
    kv_store_reference(key, value, expected, slots)
    for stored in (value, value.contiguous()):  # in one tensor with the keys, or apart
        kv_store(key, stored, actual, slots)
        assert torch.equal(actual, expected)
        actual.fill_(-1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"), [(4, 2, 16, 16), (9, 3, 20, 8), (15, 15, 80, 20), (3, 1, 128, 128)]
)
def test_rotate_and_store(
    heads: int, kv_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype, close: Check, launches: list[str]
) -> None:
    fused = torch.randn(6, heads + 2 * kv_heads, head_dim).to(dtype)
    query_key, value = fused.split_with_sizes([heads + kv_heads, kv_heads], dim=1)
    cos, sin = (x.to(dtype) for x in rotary_angles(torch.tensor([0, 3, 99, 2, 7, 1000]), rotary_dim, 1e4))
    slots = torch.tensor([3, -1, 17, 35, 0, 8])
    cache = torch.full((9, 2, kv_heads, 4, head_dim), -1.0, dtype=dtype)
    again, expected = cache.clone(), cache.clone().float()
    query = rotate_and_store(query_key, value, cos, sin, cache, slots)
    assert launches == ["_rotate_and_store"]
    wide = query_key.float(), value.float(), cos.float(), sin.float()
    close("query", query, rotate_and_store_reference(*wide, expected, slots))
    close("keys", cache[:, 0], expected[:, 0])
    assert torch.equal(cache[:, 1].float(), expected[:, 1])
    assert bool((cache[expected == -1] == -1).all())
    apart = rotate_and_store(query_key.contiguous(), value.contiguous(), cos, sin, again, slots)
    assert torch.equal(apart, query)
    assert torch.equal(again, cache)


def test_keys_that_do_not_rotate_are_stored_as_they_are(launches: list[str]) -> None:
    fused, slots = torch.randn(2, 8, 16), torch.tensor([5, 0])
    cache = torch.zeros(2, 2, 2, 4, 16)
    expected = cache.clone()
    query = rotate_and_store(fused[:, :6], fused[:, 6:], None, None, cache, slots)
    assert torch.equal(query, rotate_and_store_reference(fused[:, :6], fused[:, 6:], None, None, expected, slots))
    assert torch.equal(cache, expected)
    assert launches == ["_store_token"]


def test_kv_store_beyond_the_reach_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    stride = 2**30 + 64
    cache = torch.empty(2 * stride + 512, dtype=torch.float16).as_strided((3, 2, 1, 16, 16), (stride, 256, 256, 16, 1))
    key, value = torch.randn(2, 1, 1, 16).half()
    kv_store(key, value, cache, torch.tensor([2 * 16 + 5]))
    assert torch.equal(cache[2, :, 0, 5], torch.cat([key[0], value[0]]))
    cos = torch.ones(1, 1, 16).half()
    rotate_and_store(torch.cat([value, key], 1), value, cos, 0 * cos, cache, torch.tensor([2 * 16 + 7]))
    assert torch.equal(cache[2, :, 0, 7], torch.cat([key[0], value[0]]))
