"""The resampler's kernels against their reference: any number of features, output and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.resampler_attention import resampler_attention, resampler_attention_reference

# media, latents, features, heads, head size
SHAPES = {
    "image": (2, 64, 49, 2, 64),
    "video": (1, 7, 200, 2, 40),
    "whole_blocks": (1, 64, 64, 1, 96),
    "many_latents": (1, 70, 1, 2, 16),
    "no_features": (1, 5, 0, 1, 16),
}
NAMES = ("out", "query", "feature_key", "feature_value", "latent_key", "latent_value")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    close: Callable[..., None],
    gradients: Callable[..., list[Tensor]],
) -> None:
    media, latents, features, heads, head_dim = shape
    feature_kv = torch.randn(media, features, 2, heads, head_dim).to(dtype)  # as one projection makes both
    latent_kv = torch.randn(media, latents, 2, heads, head_dim).to(dtype)
    query = torch.randn(media, latents, heads, head_dim).to(dtype)
    inputs = (query, *feature_kv.unbind(2), *latent_kv.unbind(2))
    actual = gradients(lambda *x: resampler_attention(*x, scale=0.2), *inputs)
    expected = gradients(lambda *x: resampler_attention_reference(*x, scale=0.2), *(x.float() for x in inputs))
    for name, got, want in zip(NAMES, actual, expected, strict=True):
        close(name, got, want, factor=1 if name == "out" else 2)


def test_keys_and_values_of_different_layouts_are_copied(close: Callable[..., None]) -> None:
    query, key, value = torch.randn(3, 1, 5, 2, 16)
    features = torch.randn(1, 2, 9, 16).transpose(1, 2)
    out = resampler_attention(query, features, features.contiguous(), key, value, scale=0.2)
    close("out", out, resampler_attention_reference(query, features, features, key, value, scale=0.2))
