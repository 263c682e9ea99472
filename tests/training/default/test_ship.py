"""Test that only the bridge of a run is shipped, and nothing of the experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from model.folder import save_folder
from model.kin import COMPONENTS
from model.zoo.bridge import load_bridge
from tests.tiny_models import CONFIGS, KIN_CONFIG, byte_tokenizer, tiny_model
from training.bridge import is_bridge
from training.default.ship import changes, ship


def test_the_directions_of_kin_are_shipped_unchanged(tmp_path: Path) -> None:
    tensors = tiny_model(KIN_CONFIG).state_dict()
    save_folder(tmp_path / "run" / "model", KIN_CONFIG, tensors.items(), byte_tokenizer().to_str())
    ship(tmp_path / "run", tmp_path / "bridge.safetensors")
    shipped = load_bridge(tmp_path / "bridge.safetensors")
    assert {name for name in shipped if name.startswith("vision.")} == {COMPONENTS}
    assert shipped[COMPONENTS].equal(tensors[COMPONENTS])


def test_changes_of_the_configuration_are_listed() -> None:
    before = CONFIGS["flamingo"]
    assert changes(before, replace(before, name="other")) == []
    assert changes(before, replace(KIN_CONFIG, resampler=replace(before.resampler, num_latents=8))) == [
        "vision.kin = KinConfig(dim=3, num_classes=5, num_ancestors=7)",
        "resampler.num_latents = 8",
    ]


def test_a_runs_bridge_is_shipped(tmp_path: Path) -> None:
    config = CONFIGS["flamingo"]
    tensors = tiny_model(config).state_dict()
    save_folder(tmp_path / "run" / "model", config, tensors.items(), byte_tokenizer().to_str())
    ship(tmp_path / "run", tmp_path / "bridge.safetensors")
    shipped = load_bridge(tmp_path / "bridge.safetensors")
    assert shipped.keys() == {name for name in tensors if is_bridge(name)}
    for name, tensor in shipped.items():
        # the larger matrices are stored as rows of 8 bits
        assert float((tensor - tensors[name]).abs().max()) <= float(tensors[name].abs().max()) / 200
