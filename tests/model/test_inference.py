"""A prepared model answers as the loaded one does, in every format, and can be prepared again."""

from __future__ import annotations

import pytest
import torch

from model.cpu import FLOAT32
from model.inference import prepare_for_inference
from model.reference import encode, log_probs
from tests.tiny_models import CONFIGS, FAMILIES, Family, tiny_model

TOKENS, INDEX = [5, 257, 9, 11, 257, 20, 21], [-1, 0, 0, 0, 1, 1, 1]
PIXELS = list(torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_formats_only_gates_and_media_maps_change(family: Family) -> None:
    loaded, model = tiny_model(CONFIGS[family]), tiny_model(CONFIGS[family])
    prepared = prepare_for_inference(model)
    assert prepared.flamingo is model
    assert prepared.formats == {}
    assert all(gated.attn_gate is None for gated in model.gated_layers().values())
    unchanged = {name for name in loaded.state_dict() if not name.startswith("gated.")}
    assert all(torch.equal(model.state_dict()[name], loaded.state_dict()[name]) for name in unchanged)
    expected = log_probs(loaded, TOKENS, INDEX, encode(loaded, PIXELS))
    torch.testing.assert_close(log_probs(model, TOKENS, INDEX, encode(model, PIXELS)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_formats_and_prepared_twice(family: Family) -> None:
    loaded, model = tiny_model(CONFIGS[family]), tiny_model(CONFIGS[family])
    tokens = loaded.encode_media(torch.stack(PIXELS))
    first = prepare_for_inference(model, FLOAT32)
    assert first.formats
    second = prepare_for_inference(model)
    for prepared in (first, second):
        torch.testing.assert_close(prepared.project_media(tokens), loaded.media_kv(tokens), atol=1e-5, rtol=1e-5)
    expected = log_probs(loaded, TOKENS, INDEX, encode(loaded, PIXELS))
    torch.testing.assert_close(log_probs(model, TOKENS, INDEX, encode(model, PIXELS)), expected, atol=1e-4, rtol=0)
