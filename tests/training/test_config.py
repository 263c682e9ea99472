"""Tests of a run's configuration: unknown keys and invalid values are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import ConfigError
from training.config import parse_config, read_config

SET: dict[str, object] = {"name": "a", "kind": "pairs", "shards": "*.tar"}
EPISODES: dict[str, object] = {"name": "e", "kind": "episodes", "shards": "data"}
MINIMAL = {"model": "m", "out": "o", "steps": 3, "sets": [SET]}
# an ablation's file is a change to a run and has its own test
COMMITTED = sorted(file for file in Path("training").rglob("*.yaml") if file.parent.name != "ablations")


def test_a_minimal_run_is_accepted() -> None:
    config = parse_config(MINIMAL)
    assert config.sets[0].name == "a"
    assert config.optim.clip == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, "config: unknown key stepz"),
        ({"model": "birds/model", "out": "birds"}, "out/model would replace the initial model birds/model"),
        ({"model": "a/../birds/model/", "out": "birds"}, "out/model would replace the initial model"),
        ({"sets": [{"name": "a", "kind": "pears", "shards": "x"}]}, r"config.sets\[0\].kind: 'pears' is not one of"),
        ({"sets": []}, "sets is empty"),
        ({"sets": [SET, SET]}, "sets must have different names: a, a"),
        ({"sets": [{**SET, "batch_size": 5, "streams": 2}]}, "5 is not a multiple of streams 2"),
        ({"optim": {"learning_rat": 1.0}}, "config.optim: unknown key learning_rat"),
        ({"optim": {"end": 1.5}}, "optim.end is 1.5, must be between 0 and 1"),
        ({"optim": {"decay": "exponential", "end": 0}}, "optim.end is 0, which an exponential decay never reaches"),
        ({"trains": []}, r"trains is \[\], must list one or more of bridge, vision, language_model"),
        ({"trains": ["bridge", "head"]}, r"trains is \['bridge', 'head'\]"),
        ({"trains": ["vision", "vision"]}, "each once"),
        ({"trains": ["vision"], "sets": [EPISODES]}, "set e: kind episodes reads the default model's cached features"),
        ({"image_size": 480, "sets": [EPISODES]}, "vision or image_size"),
        ({"frame_scale": 2.0}, "frame_scale changes the untrained bridge and needs `bridge: start`"),
        ({"ablate": {"gate": "none"}}, "ablate changes the untrained bridge and needs `bridge: start`"),
        ({"ablate": {"gates": "none"}}, "config.ablate: unknown key gates"),
        ({"discriminants": "data"}, "discriminants initialise what the bridge reads and need `bridge: start` or kin"),
        ({"kin": 32}, "kin is added to a trained bridge along the discriminants of a folder: set discriminants"),
        ({"optim": {"matrices": "shampoo"}}, "config.optim.matrices: 'shampoo' is not one of 'adamw', 'muon'"),
        ({"vision": "out/vision"}, "vision replaces the encoder that the bridge was trained on"),
        ({"language_model": "scratch"}, "trains must list language_model"),
        ({"trains": ["language_model"], "objective": "alignment"}, "trains must not list language_model"),
    ],
)
def test_an_invalid_configuration_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**MINIMAL, **change})


def test_an_export_has_a_name_of_its_own() -> None:
    assert parse_config({**MINIMAL, "out": "runs/birds"}).export_name == "birds"
    assert parse_config({**MINIMAL, "name": "finches"}).export_name == "finches"


DOCUMENTS = {"name": "d", "kind": "documents", "shards": "*.tar"}
FEW_SHOT = "no set has sequences of several images: the model may lose its few-shot ability"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"steps": 50, "sets": [SET, DOCUMENTS]},
            ["steps is 50 and optim.warmup_steps is 200: the run ends during warm-up, at 25%"],
        ),
        ({"steps": 200, "sets": [SET, DOCUMENTS]}, []),
        ({"steps": 200}, [FEW_SHOT]),
        ({"steps": 200, "sets": [SET, {**SET, "name": "v", "kind": "videos"}]}, [FEW_SHOT]),
        ({"steps": 200, "sets": [EPISODES]}, []),
        ({"steps": 100}, ["the run ends during warm-up, at 50%", FEW_SHOT]),
    ],
)
def test_a_run_that_is_seldom_intended_is_warned_about(change: dict[str, object], expected: list[str]) -> None:
    warnings = list(parse_config({**MINIMAL, "optim": {"warmup_steps": 200}, **change}).warnings())
    assert len(warnings) == len(expected)
    assert all(part in warning for part, warning in zip(expected, warnings, strict=True))


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.name)
def test_every_committed_run_can_be_read(file: Path) -> None:
    assert read_config(file).steps > 0


def test_the_default_models_runs_are_among_the_committed_runs() -> None:
    assert {"alignment.yaml", "binding.yaml"} <= {file.name for file in COMMITTED}
