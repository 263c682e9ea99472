"""What trains and what must not: the names, the precision, and a digest that notices one bit."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import CONFIGS, FAMILIES, Family, tiny_model
from training.bridge import bridge_parameters, freeze, frozen_digest


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bridge_and_the_new_rows_train_and_nothing_else(family: Family) -> None:
    model = tiny_model(CONFIGS[family])
    freeze(model, torch.bfloat16)
    trained = {name for name, _ in bridge_parameters(model)}
    assert {name.split(".")[0] for name in trained} == {"resampler", "gated", "language_model"}
    assert all(name.endswith("new_rows") for name in trained if name.startswith("language_model"))
    assert {parameter.dtype for _, parameter in bridge_parameters(model)} == {torch.float32}
    frozen = {p.dtype for n, p in model.language_model.named_parameters() if not n.endswith("new_rows")}
    assert frozen == {torch.bfloat16}


def test_the_digest_sees_a_frozen_weight_and_not_the_bridge() -> None:
    model = tiny_model(CONFIGS["flamingo"])
    before = frozen_digest(model)
    with torch.no_grad():
        model.resampler.latents.add_(1.0)
    assert frozen_digest(model) == before
    with torch.no_grad():
        model.language_model.norm.weight.view(-1)[0] += 1e-6
    assert frozen_digest(model) != before
