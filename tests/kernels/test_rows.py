"""The references of the row operators against torch, and the resampler's attention against its definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from kernels.backend import select
from kernels.resampler_attention import resampler_attention, resampler_attention_reference
from kernels.rows import (
    add_layer_norm,
    add_layer_norm_reference,
    gated_residual,
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)


@pytest.fixture(autouse=True)
def in_torch() -> Iterator[None]:
    torch.manual_seed(5)
    select("reference")
    yield
    select("auto")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_norms(bias: bool) -> None:
    x, weight = 5 + torch.randn(2, 3, 24), torch.randn(24)
    shift = torch.randn(24) if bias else None
    expected = F.layer_norm(x, (24,), weight, shift, 1e-5)
    torch.testing.assert_close(layer_norm(x, weight, shift, 1e-5), expected)
    torch.testing.assert_close(layer_norm_reference(x, weight, shift, 1e-5), expected)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (24,), weight, 1e-5))
    torch.testing.assert_close(rms_norm_reference(x, weight, 1e-5), F.rms_norm(x, (24,), weight, 1e-5))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_add_layer_norm(bias: bool) -> None:
    x, branch, weight = torch.randn(3, 24), torch.randn(3, 24), torch.randn(24)
    shift = torch.randn(24) if bias else None
    h, normed = add_layer_norm(x, branch, weight, shift, 1e-5)
    assert torch.equal(h, x + branch)
    assert torch.equal(normed, layer_norm(x + branch, weight, shift, 1e-5))
    _, expected = add_layer_norm_reference(x, branch, weight, shift, 1e-5)
    torch.testing.assert_close(normed, expected)


@pytest.mark.parametrize("width", [1, 24], ids=["scalar", "channel"])
def test_gated_residual(width: int) -> None:
    x, branch, gate = torch.randn(3, 24), torch.randn(3, 24), torch.randn(width)
    torch.testing.assert_close(gated_residual(x, branch, gate), x + torch.tanh(gate) * branch)
    assert torch.equal(gated_residual(x, branch, torch.zeros(width)), x)


def test_a_small_gate_is_not_lost_in_bfloat16() -> None:
    branch, gate = torch.ones(1, 4).bfloat16(), torch.tensor([1e-3]).bfloat16()
    out = gated_residual(torch.zeros(1, 4).bfloat16(), branch, gate)
    torch.testing.assert_close(out, gate.float().tanh().bfloat16().expand(1, 4))


@pytest.mark.parametrize("num_features", [0, 9])
def test_latents_attend_to_features_and_to_themselves(num_features: int) -> None:
    query, latent_key, latent_value = torch.randn(3, 2, 5, 3, 16)
    feature_key, feature_value = torch.randn(2, 2, num_features, 3, 16)
    key, value = torch.cat([feature_key, latent_key], 1), torch.cat([feature_value, latent_value], 1)
    weights = (torch.einsum("rk,nk->rn", query[1, :, 2], key[1, :, 2]) * 0.2).softmax(-1)
    for function in (resampler_attention, resampler_attention_reference):
        out = function(query, feature_key, feature_value, latent_key, latent_value, scale=0.2)
        torch.testing.assert_close(out[1, :, 2], weights @ value[1, :, 2])
