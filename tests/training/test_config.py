"""Tests of a run's configuration: unknown keys and invalid values are refused by name."""

from __future__ import annotations

import math
import re
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
    assert config.precision == "auto"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, "config: unknown key stepz"),
        ({"model": "birds/model", "out": "birds"}, "out/model would replace the initial model birds/model"),
        ({"model": "a/../birds/model/", "out": "birds"}, "out/model would replace the initial model"),
        ({"sets": [{"name": "a", "kind": "pears", "shards": "x"}]}, r"config.sets\[0\].kind: 'pears' is not one of"),
        ({"sets": []}, "sets is empty"),
        ({"sets": None}, "config.sets: expected a list, got NoneType"),
        ({"sets": SET}, "config.sets: expected a list, got dict"),
        ({"sets": ["pages"]}, r"config.sets\[0\]: expected an object, got str"),
        ({1: 2}, "config: unknown key 1"),
        ({"sets": [SET, SET]}, "sets must have different names: a, a"),
        ({"sets": [{**SET, "batch_size": 5, "streams": 2}]}, "5 is not a multiple of streams 2"),
        ({"optim": {"learning_rat": 1.0}}, "config.optim: unknown key learning_rat"),
        ({"optim": {"learning_rate": math.inf}}, "optim.learning_rate is inf, must be finite"),
        ({"sets": [{**SET, "weight": math.nan}]}, "set a: weight is nan, must be finite"),
        ({"sets": [{**SET, "min_media": 6}]}, "set a: min_media is 6, must be at most max_media, which is 5"),
        ({"optim": {"betas": [1.5, 0.9]}}, r"optim.betas is \[1.5, 0.9\], must be at least 0 and less than 1"),
        ({"sets": [{**SET, "min_similarity": math.nan}]}, "set a: min_similarity is nan, must be finite"),
        ({"sets": [{**SET, "name": " "}]}, "sets.name is empty, must be a text"),
        ({"model": ""}, "model is empty, must be a text"),
        ({"out": ""}, "out is empty, must be a text"),
        ({"out": "~no-such-user/x"}, "out is ~no-such-user/x, but there is no such user"),
        ({"sets": [{**SET, "shards": "~no-such-user/*.tar"}]}, "shards is ~no-such-user/.*, but there is no such user"),
        ({"steps": 10**400}, f"steps has too many digits, must be at most {2**63 - 1}"),
        ({"seed": 2**70}, "seed has too many digits"),
        ({"sets": [{**SET, "window": 10**20}]}, "set a: window has too many digits"),
        ({"optim": {"warmup_steps": 10**400}}, "optim.warmup_steps has too many digits"),
        ({"optim": {"learning_rate": 10**400}}, "config.optim.learning_rate: expected float, got a number of too many"),
        ({"optim": {"learning_rate": 1e38}}, r"optim.learning_rate gives a rate of 1e\+38, must be at most 1e\+30"),
        ({"optim": {"learning_rate": 1e20, "gate_rate": 1e20}}, r"optim.learning_rate gives a rate of 1e\+40"),
        ({"image_size": 10**9}, "image_size is 1000000000, must be at most 4096"),
        ({"seed": -1}, "seed is -1, must be at least 0"),
        ({"optim": {"end": 1.5}}, "optim.end is 1.5, must be between 0 and 1"),
        ({"optim": {"decay": "exponential", "end": 0}}, "optim.end is 0, which an exponential decay never reaches"),
        ({"trains": []}, r"trains is \[\], must list one or more of bridge, vision, language_model"),
        ({"trains": ["bridge", "head"]}, r"trains is \['bridge', 'head'\]"),
        ({"trains": ["vision", "vision"]}, "each once"),
        (
            {"trains": ["vision"], "bridge": "start"},
            "closes the gates, so the encoder gets no gradient: trains must list",
        ),
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


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("weight", -1.0, 0),
        ("batch_size", 0, 1),
        ("batch_size", -4, 1),
        ("streams", 0, 1),
        ("window", 0, 1),
        ("max_tokens", 0, 1),
        ("max_media", 0, 1),
        ("max_frames", 0, 1),
    ],
)
def test_a_field_of_a_set_has_a_minimum(field: str, value: float, least: int) -> None:
    message = f"set a: {field} is {value}, must be at least {least}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config({**MINIMAL, "sets": [{**SET, field: value}]})


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("learning_rate", -1e-3, 0),
        ("warmup_steps", -5, 0),
        ("clip", -1.0, 0),
        ("weight_decay", -0.1, 0),
    ],
)
def test_a_field_of_the_optimizer_has_a_minimum(field: str, value: float, least: int) -> None:
    with pytest.raises(ConfigError, match=f"optim.{field} is {value}, must be at least {least}"):
        parse_config({**MINIMAL, "optim": {field: value}})


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [("steps", -1, 0), ("pack_tokens", 0, 1), ("checkpoint_steps", 0, 1), ("log_steps", 0, 1), ("image_size", -8, 0)],
)
def test_a_field_of_a_run_has_a_minimum(field: str, value: int, least: int) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}, must be at least {least}"):
        parse_config({**MINIMAL, field: value})


def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\nsets: [1\n")
    with pytest.raises(ConfigError, match=r"^\S+run.yaml is not YAML: .*line 3, column 1"):
        read_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nout: o\nmodel: b\n", "the key model occurs twice in .*line 3"),
        ("sets:\n  - {name: a, shards: x, name: b}\n", "the key name occurs twice in .*line 2"),
        ('model: "a\\0b"\n', "a text with a NUL or half of a surrogate pair in .*line 1"),
        ('model: "\\uD800"\n', "a text with a NUL or half of a surrogate pair in .*line 1"),
        (f"steps: {'9' * 5000}\n", "not YAML: Exceeds the limit"),
        ("[" * 5000, "not YAML: maximum recursion"),
    ],
)
def test_a_file_with_other_than_one_plain_value_per_key_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "run.yaml")


def test_merged_keys_may_be_replaced(tmp_path: Path) -> None:
    sets = "sets:\n  - &first {name: a, kind: pairs, shards: x}\n  - {<<: *first, name: b}\n"
    (tmp_path / "run.yaml").write_text(f"model: m\nout: o\nsteps: 1\n{sets}")
    assert [(data_set.name, data_set.shards) for data_set in read_config(tmp_path / "run.yaml").sets] == [
        ("a", "x"),
        ("b", "x"),
    ]


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^there is no file {tmp_path}/run\.yaml$"):
        read_config(tmp_path / "run.yaml")


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
