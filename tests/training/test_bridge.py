"""Tests of freezing: which parameters train, their precision, and a digest that detects any change."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import CONFIGS, FAMILIES, Family, tiny_model
from training.bridge import freeze, frozen_digest, trained_parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_bridge_and_the_new_rows_train(family: Family) -> None:
    model = tiny_model(CONFIGS[family])
    freeze(model, torch.bfloat16)
    trained = {name for name, _ in trained_parameters(model)}
    assert {name.split(".")[0] for name in trained} == {"resampler", "gated", "language_model"}
    assert all(name.endswith("new_rows") for name in trained if name.startswith("language_model"))
    assert {parameter.dtype for _, parameter in trained_parameters(model)} == {torch.float32}
    frozen = {p.dtype for n, p in model.language_model.named_parameters() if not n.endswith("new_rows")}
    assert frozen == {torch.bfloat16}


def test_the_digest_covers_frozen_weights_and_not_the_bridge() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    before = frozen_digest(model)
    with torch.no_grad():
        model.resampler.latents.add_(1.0)
    assert frozen_digest(model) == before
    with torch.no_grad():
        model.language_model.norm.weight.view(-1)[0] += 1e-6
    assert frozen_digest(model) != before
