"""Test that only the bridge of a run is shipped, and nothing of the experts."""

from __future__ import annotations

from pathlib import Path

from model.folder import save_folder
from model.zoo.bridge import load_bridge
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model
from training.bridge import is_bridge
from training.default.ship import ship


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
