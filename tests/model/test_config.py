"""Configuration: conflicts are reported by field with both values, JSON round-trips, and weights have a fingerprint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.config import ConfigError, FlamingoConfig, fingerprint, from_dict, load_config
from tests.tiny_models import CONFIGS, FAMILIES, Family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_round_trips_through_json(family: Family, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIGS[family].to_json())
    assert load_config(tmp_path) == CONFIGS[family]


@pytest.mark.parametrize(
    "data", [b"{", b'{"name": "\xff"}', b'{"a":' * 100_000], ids=["cut", "not UTF-8", "nested too deep"]
)
def test_bytes_that_are_not_json_are_refused_by_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["gated", "intervall"], 2, "config.gated: unknown key intervall"),
        (["gated", "interval"], "2", "config.gated.interval: expected int, got '2'"),
        (["gated", "interval"], True, "config.gated.interval: expected int, got True"),
        (["gated", "first_layer"], 9, "give no gated layer"),
        (["gated", "first_layer"], -1, "gated.first_layer is -1, must be in 0..16777216"),
        (["language_model", "dim"], 2**63, f"language_model.dim is {2**63}, must be in 0..16777216"),
        (["language_model", "num_layers"], 1001, "language_model.num_layers is 1001, must be in 0..1000"),
        (["vision", "num_heads"], 0, "vision.feature_dim 16 is not a multiple of vision.num_heads 0"),
        (["vision", "num_layers"], 2**24, "vision.num_layers is 16777216, must be in 0..1000"),
        (["resampler", "num_layers"], 1001, "resampler.num_layers is 1001, must be in 0..1000"),
        (["language_model", "num_kv_heads"], 3, "num_heads 4 is not a multiple of num_kv_heads 3"),
        (["language_model", "position"], "sinus", "config.language_model.position: 'sinus' is not one of"),
        (["language_model", "rotary_dim"], 9, "must be in 1..8 (head_dim"),
        (["language_model", "alone_positions"], "row", "config.language_model.alone_positions: 'row' is not one of"),
        (["vision", "num_patches"], 9, "vision.num_patches is 9, but the sizes give 5"),
        (["resampler", "dim"], 20, "resampler.dim 20 differs from the width 16 of the vision features"),
        (["resampler", "num_spatial"], 7, "is neither 0 nor vision.num_patches 5"),
        (["format_version"], 2, "format_version 2, this version reads 1"),
        (["vision"], 1, "config.vision: expected an object, got int"),
        (["vision", "mean"], [0.5, "0.5", 0.5], r"config.vision.mean\[1\]: expected float, got '0.5'"),
        (["vision", "std"], [0.5, 1], "config.vision.std: expected 3 values, got 2"),
        (["vision", "std"], [0.5, 0.0, 0.5], r"vision.std is \[0.5, 0.0, 0.5\], must be positive and finite"),
        (["vision", "mean"], [0.5, float("nan"), 0.5], r"vision.mean is \[0.5, nan, 0.5\], must be between 0 and 1"),
        (["vision", "mean"], [123.675, 116.28, 103.53], "vision.mean is .*, must be between 0 and 1"),
        (["prompt", "eos"], ["</s>", ["a"]], r"config.prompt.eos\[1\]: expected str, got \['a'\]"),
    ],
)
def test_a_wrong_value_is_named(path: list[str], value: object, message: str) -> None:
    values = json.loads(CONFIGS["idefics"].to_json())
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        from_dict(FlamingoConfig, values)


def test_learned_positions_are_in_no_row() -> None:
    text = CONFIGS["idefics"].language_model
    assert replace(text, alone_positions="in_a_row").has_key_offsets
    assert not replace(text, alone_positions="in_a_row", position="alibi").has_key_offsets
    with pytest.raises(ConfigError, match="alone_positions is 'in_a_row', must be 'restart' with learned positions"):
        replace(text, alone_positions="in_a_row", position="learned")


def test_a_missing_key_is_named() -> None:
    values = json.loads(CONFIGS["idefics"].to_json())
    del values["gated"]["interval"]
    with pytest.raises(ConfigError, match=r"config\.gated: missing key interval"):
        from_dict(FlamingoConfig, values)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_config(tmp_path)


def test_the_two_conventions_of_placement_differ() -> None:
    layers = CONFIGS["openflamingo"].gated
    assert replace(layers, first_layer=3, interval=4).layers(32) == (3, 7, 11, 15, 19, 23, 27, 31)
    assert replace(layers, first_layer=0, interval=4).layers(32) == (0, 4, 8, 12, 16, 20, 24, 28)


VISION = np.arange(4096, dtype=np.float32).reshape(64, 64)
HEAD = np.ones(3, np.float32)


def folder(path: Path, *, vision: np.ndarray = VISION, head: np.ndarray = HEAD, config: str = "{}") -> Path:
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "tokenizer.json").write_text("{}")
    save_file({"vision": vision, "head": head}, path / "model.safetensors")
    return path


def test_a_copy_has_the_same_fingerprint(tmp_path: Path) -> None:
    first = folder(tmp_path / "first")
    shutil.copytree(first, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("notes are no weights")
    assert fingerprint(first) == fingerprint(tmp_path / "copy")
    assert len(fingerprint(first)) == 32


@pytest.mark.parametrize(
    "other",
    [
        {"vision": VISION + 1},
        {"head": HEAD * 2},
        {"vision": VISION.reshape(4096)},
        {"vision": VISION.astype(np.float16)},
        {"config": '{"dim": 2}'},
    ],
    ids=["a large tensor", "a small tensor", "a shape", "a type", "the config"],
)
def test_changes_of_the_model_change_the_fingerprint(tmp_path: Path, other: dict[str, np.ndarray]) -> None:
    assert fingerprint(folder(tmp_path / "first")) != fingerprint(folder(tmp_path / "other", **other))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "table",
    [
        *(b"{", b"[]", b'{"a": 1}', b'{"a": {}}', b"\xff", b'{"a":' * 100_000, b'{"a": {"data_offsets": "ab"}}'),
        *(b'{"a": {"data_offsets": [%s]}}' % offsets for offsets in (b"1", b"5, 1", b"-9, 4", b"0, 9999999")),
    ],
)
def test_weights_that_cannot_be_read_are_refused_by_name(table: bytes, tmp_path: Path) -> None:
    file = folder(tmp_path / "folder") / "model.safetensors"
    file.write_bytes(len(table).to_bytes(8, "little") + table + bytes(8))
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read as safetensors"):
        fingerprint(tmp_path / "folder")


def test_weights_that_announce_a_large_table_take_no_memory(tmp_path: Path) -> None:
    file = folder(tmp_path / "folder") / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    fingerprint(tmp_path / "folder")
