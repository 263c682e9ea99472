"""What is shipped of several runs is their bridges' mean, and nothing of the experts."""

from __future__ import annotations

from pathlib import Path

from model.checkpoint.native import save_folder
from model.zoo.bridge import load_bridge
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model
from training.bridge import is_bridge
from training.default.ship import ship


def test_the_mean_of_two_runs_is_shipped(tmp_path: Path) -> None:
    config, tokenizer = CONFIGS["flamingo"], byte_tokenizer().to_str()
    models = [tiny_model(config, seed).state_dict() for seed in (0, 1)]
    for name, tensors in zip("ab", models, strict=True):
        save_folder(tmp_path / name / "model", config, tensors.items(), tokenizer)
    ship([tmp_path / "a", tmp_path / "b"], tmp_path / "bridge.safetensors")
    shipped = load_bridge(tmp_path / "bridge.safetensors")
    assert shipped.keys() == {name for name in models[0] if is_bridge(name)}
    for name, tensor in shipped.items():
        mean = (models[0][name].float() + models[1][name].float()) / 2
        # 8 bits a row of the larger matrices
        assert float((tensor - mean).abs().max()) <= float(mean.abs().max()) / 200
