"""Tests of fine-tuning: exactly the parts that a run lists change, resume and are exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import VisionConfig
from model.folder import load_folder
from tests.tiny_models import byte_tokenizer, tiny_model
from tests.training.toy import CONFIG, losses, make_run, make_trainer
from training.bridge import freeze, frozen_digest, is_bridge, trained_parameters
from training.checkpoint import restore_stored_weights
from training.trainer import FrozenWeightsChanged, Trainer, run

PARTS = [("bridge",), ("bridge", "vision"), ("vision",), ("bridge", "language_model"), ("language_model", "vision")]
# a network with batch norms, whose affine parameters train and whose statistics do not
NORMED = VisionConfig(
    architecture="test_efficientnet",
    image_size=64,
    feature_dim=256,
    num_patches=4,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resize="squash",
)


def part_of(name: str) -> str:
    return "bridge" if is_bridge(name) else name.split(".")[0]


def copy_tensors(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize("trains", PARTS, ids="+".join)
def test_only_the_listed_parts_change(tmp_path: Path, trains: tuple[str, ...]) -> None:
    trainer = make_trainer(make_run(tmp_path, trains=trains))
    before = copy_tensors(trainer)
    losses(trainer)
    trainer.check_frozen()
    changed = {
        part_of(name) for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == set(trains)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("trains", PARTS[1:], ids="+".join)
def test_a_resumed_run_has_the_same_losses_and_weights(tmp_path: Path, trains: tuple[str, ...], precision: str) -> None:
    config = make_run(tmp_path, steps=5, precision=precision, trains=trains)
    uninterrupted = make_trainer(config)
    expected_losses = losses(uninterrupted)
    interrupted = make_trainer(config)
    first = [dict(next(interrupted.steps()).losses) for _ in range(3)]
    interrupted.save()
    resumed = make_trainer(config)
    assert resumed.resume() == 3
    assert first + losses(resumed) == expected_losses
    expected = uninterrupted.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


def test_the_served_folder_holds_the_trained_weights_and_declares_them_as_float(tmp_path: Path) -> None:
    quantised = replace(CONFIG, language_model=replace(CONFIG.language_model, weights="q4"))
    config = make_run(tmp_path, trains=("bridge", "vision", "language_model"), model=quantised)
    file = tmp_path / "tokenizer.json"
    file.write_text(byte_tokenizer().to_str())
    trainer = make_trainer(config)
    run(trainer, file)
    served = load_folder(tmp_path / "out" / "model", "cpu", torch.float32)
    expected = trainer.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in served.state_dict().items())
    assert served.config.language_model.weights == "float"
    assert served.config.name == "out"
    assert replace(served.config, language_model=quantised.language_model, name=quantised.name) == quantised


def test_a_frozen_language_model_stays_declared_as_quantised(tmp_path: Path) -> None:
    quantised = replace(CONFIG, language_model=replace(CONFIG.language_model, weights="q4"))
    assert make_trainer(make_run(tmp_path, trains=("vision",), model=quantised)).model.config == quantised


@pytest.mark.parametrize("trains", PARTS, ids="+".join)
def test_the_digest_covers_exactly_the_frozen_weights(trains: tuple[str, ...]) -> None:
    model = tiny_model(CONFIG)
    freeze(model, torch.float32, trains)
    trained = {name for name, _ in trained_parameters(model)}
    before = frozen_digest(model, trains)
    for name, tensor in model.state_dict().items():
        tensor.view(-1)[0] += 1.0
        assert (frozen_digest(model, trains) == before) == (name in trained), name
        tensor.view(-1)[0] -= 1.0
        before = frozen_digest(model, trains)


def test_statistics_of_a_trained_encoder_stay_unchanged_and_are_checked(tmp_path: Path) -> None:
    normed = replace(CONFIG, vision=NORMED)
    trainer = make_trainer(make_run(tmp_path, steps=2, trains=("bridge", "vision"), model=normed))
    before = copy_tensors(trainer)
    trainer.model.train()
    losses(trainer)
    trainer.check_frozen()
    after = trainer.model.state_dict()
    statistics = [name for name in before if "running_" in name]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(before["vision.encoder.bn1.weight"], after["vision.encoder.bn1.weight"])
    after[statistics[0]].add_(1.0)
    with pytest.raises(FrozenWeightsChanged):
        trainer.check_frozen()


def test_a_higher_resolution_trains_and_can_be_served(tmp_path: Path) -> None:
    config = replace(make_run(tmp_path, steps=12, trains=("bridge", "vision")), image_size=16)
    trainer = make_trainer(config)
    assert trainer.model.config.vision.num_patches == 16
    step_losses = losses(trainer)
    assert step_losses[-1]["pairs"] < 0.8 * step_losses[0]["pairs"]
    file = tmp_path / "tokenizer.json"
    file.write_text(byte_tokenizer().to_str())
    run(trainer, file)
    served = load_folder(tmp_path / "out" / "model", "cpu", torch.float32)
    assert served.config.vision.image_size == 16
    assert served.encode_media(torch.zeros(1, 1, 3, 16, 16)).shape == (1, 4, 24)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
def test_a_frozen_weight_keeps_the_format_in_which_it_is_stored(
    stored: torch.dtype, computed: torch.dtype, tmp_path: Path
) -> None:
    original = torch.randn(100).to(stored)
    save_file({"frozen": original, "trained": original.clone()}, tmp_path / "model.safetensors")
    weights = {"frozen": original.to(computed).float(), "trained": original.float() + 1.0}
    restored = dict(restore_stored_weights(iter(weights.items()), tmp_path))
    assert restored["frozen"].dtype == stored
    assert torch.equal(restored["frozen"], original)
    assert restored["trained"] is weights["trained"]


@pytest.mark.parametrize("trains", PARTS, ids="+".join)
def test_frozen_weights_are_exported_unchanged_whatever_the_runs_precision(
    tmp_path: Path, trains: tuple[str, ...]
) -> None:
    config = make_run(tmp_path, steps=2, precision="bfloat16", trains=trains)
    original = load_folder(tmp_path / "model", "cpu", torch.float32).state_dict()
    trainer = make_trainer(config)
    run(trainer, tmp_path / "model" / "tokenizer.json")
    trained = {name: p.detach() for name, p in trained_parameters(trainer.model)}
    served = load_folder(tmp_path / "out" / "model", "cpu", torch.float32).state_dict()
    assert all(torch.equal(tensor, trained.get(name, original[name])) for name, tensor in served.items())
