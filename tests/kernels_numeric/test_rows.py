"""The kernels that work row by row, against their references: gates, norms, and the cache's store."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.rows import (
    gated_residual,
    gated_residual_reference,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from kernels.self_attention import kv_store, kv_store_reference

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
def test_kv_store(dtype: torch.dtype) -> None:
    fused = torch.randn(6, 9, 20).to(dtype)
    key, value = fused[:, 3:6], fused[:, 6:]
    slots = torch.tensor([3, -1, 17, 35, 0, 8])
    actual = torch.full((9, 2, 3, 4, 20), -1.0, dtype=dtype)
    expected = actual.clone()
    kv_store(key, value, actual, slots)
    kv_store_reference(key, value, expected, slots)
    assert torch.equal(actual, expected)


def test_kv_store_beyond_the_reach_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    stride = 2**30 + 64
    cache = torch.empty(2 * stride + 512, dtype=torch.float16).as_strided((3, 2, 1, 16, 16), (stride, 256, 256, 16, 1))
    key, value = torch.randn(2, 1, 1, 16).half()
    kv_store(key, value, cache, torch.tensor([2 * 16 + 5]))
    assert torch.equal(cache[2, :, 0, 5], torch.cat([key[0], value[0]]))
