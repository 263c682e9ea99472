"""The launch table: its own rows, the defaults for an unknown machine, and rows replaced by a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kernels import configs
from kernels.configs import DEFAULTS, Launch, launch_config, load

ROW = {
    "operator": "media",
    "architecture": "sm_90",
    "head_dim": 64,
    "dtype": "bfloat16",
    "block": 16,
    "num_warps": 4,
    "num_stages": 3,
}


@pytest.fixture
def on_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "architecture", lambda: "sm_90")
    monkeypatch.setattr(configs, "TABLE", dict(configs.TABLE))


@pytest.mark.usefixtures("on_sm_90")
def test_a_row_of_the_table_comes_before_the_default() -> None:
    assert launch_config("paged_prefill", 128, torch.bfloat16) == Launch(64, 8, 2)
    assert launch_config("paged_prefill", 128, torch.float32) == DEFAULTS["paged_prefill"]
    assert launch_config("paged_prefill", 48, torch.bfloat16) == DEFAULTS["paged_prefill"]


@pytest.mark.usefixtures("on_sm_90")
def test_a_file_replaces_rows(tmp_path: Path) -> None:
    file = tmp_path / "launches.json"
    file.write_text(json.dumps([ROW]))
    load(file)
    assert launch_config("media", 64, torch.bfloat16) == Launch(16, 4, 3)
    assert launch_config("media", 128, torch.bfloat16) == DEFAULTS["media"]


@pytest.mark.usefixtures("on_sm_90")
def test_a_file_for_an_unknown_operator_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "launches.json"
    file.write_text(json.dumps([{**ROW, "operator": "medea"}]))
    with pytest.raises(ValueError, match="'medea' is none of media"):
        load(file)


def test_media_attention_has_one_shape_of_tile() -> None:
    """Decode and prefill sum in one order only while no row of the table takes 64 rows or more."""
    shapes = [launch for (operator, *_), launch in configs.TABLE.items() if operator == "media"]
    assert all(launch.block <= 32 and launch.num_warps == 4 for launch in [*shapes, DEFAULTS["media"]])
