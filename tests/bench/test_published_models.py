"""Published models with random weights: their parameters are those of the originals, and a folder of one can be served."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from bench import random_models
from bench.published_models import PUBLISHED, SPECS, TOY_MODEL, random_weights
from kernels.bench.sizes import TOY
from model.flamingo import Flamingo
from server.served_model import ServedModel
from server.settings import Settings

# of the vision encoders, without the parts that only CLIP's own pooling uses
BILLIONS = {"OF-3B": 0.30, "OF-9B": 0.30, "IDEFICS-9B": 0.63}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_parameters_of_the_original(name: str) -> None:
    with torch.device("meta"):
        model = Flamingo(PUBLISHED[name])
    assert round(sum(p.numel() for p in model.vision.parameters()) / 1e9, 2) == BILLIONS[name]
    step = [*model.language_model.parameters(), *model.gated.parameters()]
    projections = sum(gated.attention.key_value.weight.numel() for gated in model.gated_layers().values())
    head = 0 if PUBLISHED[name].language_model.tied_head else model.language_model.embed.weight.numel()
    assert sum(p.numel() for p in step) - projections - head == pytest.approx(SPECS[name].step_params, rel=1e-3)


def test_random_weights_are_finite_and_the_gates_are_open() -> None:
    model = random_weights(TOY_MODEL, torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert all(gated.openness() == pytest.approx((0.76, 0.76), abs=0.01) for gated in model.gated_layers().values())


def test_a_folder_with_random_weights_can_be_served(tmp_path: Path) -> None:
    with (
        patch.dict(PUBLISHED, {TOY.name: TOY_MODEL}),
        patch.object(random_models, "cache_folder", lambda name, inputs: tmp_path / name),
    ):
        folder = random_models.folder(TOY.name)
    served = ServedModel.load(Settings(model=str(folder)))
    assert served.config.name == "random-toy"
    assert served.tokenizer.media_token_id == TOY.vocab_size + 1
