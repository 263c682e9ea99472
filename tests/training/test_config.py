"""A run's file: read whole, unknown keys and impossible numbers refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import ConfigError
from training.config import parse_config, read_config

SET: dict[str, object] = {"name": "a", "kind": "pairs", "shards": "*.tar"}
EPISODES: dict[str, object] = {"name": "e", "kind": "episodes", "shards": "data"}
MINIMAL = {"model": "m", "out": "o", "steps": 3, "sets": [SET]}
# an ablation's file is a change to a run, and has a test of its own
COMMITTED = sorted(file for file in Path("training").rglob("*.yaml") if file.parent.name != "ablations")


def test_a_minimal_run() -> None:
    config = parse_config(MINIMAL)
    assert config.sets[0].name == "a"
    assert config.optim.clip == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, "config: unknown key stepz"),
        ({"sets": [{"name": "a", "kind": "pears", "shards": "x"}]}, r"config.sets\[0\].kind: 'pears' is none of"),
        ({"sets": []}, "sets is empty"),
        ({"sets": [SET, SET]}, "sets share a name: a, a"),
        ({"sets": [{**SET, "batch_size": 5, "streams": 2}]}, "5 is not a multiple of streams 2"),
        ({"optim": {"learning_rat": 1.0}}, "config.optim: unknown key learning_rat"),
        ({"optim": {"end": 1.5}}, "optim.end is 1.5, must lie in 0..1"),
        ({"optim": {"decay": "exponential", "end": 0}}, "optim.end is 0, which decay exponential never reaches"),
        ({"trains": []}, r"trains is \[\], must be some of bridge, vision, language_model"),
        ({"trains": ["bridge", "head"]}, r"trains is \['bridge', 'head'\]"),
        ({"trains": ["vision", "vision"]}, "each once"),
        ({"trains": ["vision"], "sets": [EPISODES]}, "set e: kind episodes shows the default model's features"),
        ({"image_size": 480, "sets": [EPISODES]}, "nor image_size can change them"),
        ({"ablate": {"gate": "none"}}, "ablate is another bridge than the folder's, and needs `bridge: start`"),
        ({"ablate": {"gates": "none"}}, "config.ablate: unknown key gates"),
        ({"discriminants": "data"}, "discriminants are what an untrained bridge begins with"),
        ({"optim": {"matrices": "shampoo"}}, "config.optim.matrices: 'shampoo' is none of 'adamw', 'muon'"),
        ({"vision": "out/vision"}, "vision is another encoder than the bridge was trained on"),
        ({"language_model": "scratch"}, "trains does not name language_model"),
        ({"trains": ["language_model"], "objective": "alignment"}, "trains must not name it"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINIMAL, **change})


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.name)
def test_every_committed_run_can_be_read(file: Path) -> None:
    assert read_config(file).steps > 0


def test_there_are_committed_runs() -> None:
    assert {"alignment.yaml", "binding.yaml"} <= {file.name for file in COMMITTED}
