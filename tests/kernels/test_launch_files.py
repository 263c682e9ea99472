"""Files of measured launches: their rows replace those of the table, and a wrong file replaces none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import backend, launch_files
from kernels.backend import DEFAULTS, Launch, launch_config
from kernels.bench import tuning
from kernels.bench.journal import Row
from kernels.bench.sizes import SIZES
from kernels.bench.task import Task
from kernels.launch_files import FOLDER, LaunchFileError, load_launches, read_launches, shipped_file

ROW = {
    "operator": "media",
    "architecture": "sm_90",
    "head_dim": 64,
    "dtype": "bfloat16",
    "block": 16,
    "num_warps": 4,
    "num_stages": 3,
}
CARD = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def on_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    table = dict(backend.TABLE)
    for module in (backend, launch_files):
        monkeypatch.setattr(module, "architecture", lambda: "sm_90")
        monkeypatch.setattr(module, "TABLE", table)


def write(folder: Path, content: Any) -> Path:
    file = folder / "launches.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_file_replaces_rows(tmp_path: Path) -> None:
    decode = ROW | {"operator": "paged_decode", "head_dim": 128, "num_stages": 4}
    elsewhere = ROW | {"architecture": "gfx942", "num_stages": 1}
    assert load_launches(write(tmp_path, [ROW, decode, elsewhere])) == 2
    assert launch_config("media", 64, torch.bfloat16) == Launch(16, 4, 3)
    assert launch_config("media", 128, torch.bfloat16) == DEFAULTS["media"]
    assert launch_config("paged_decode", 128, torch.bfloat16) == Launch(16, 4, 4)
    assert backend.TABLE["media", "gfx942", 64, "bfloat16"] == Launch(16, 4, 1)


def test_a_file_in_which_nothing_is_faster_changes_nothing(tmp_path: Path) -> None:
    before = dict(backend.TABLE)
    assert load_launches(write(tmp_path, [])) == 0
    assert before == backend.TABLE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ({"media": ROW}, "contains a dict, not a list of launches"),
        ([ROW, "media"], "row 2: it is not an object with the fields operator, "),
        ([{**ROW, "warps": 4}], "row 1: it is not an object with the fields operator, "),
        ([{**ROW, "operator": "medea"}], "row 1: operator 'medea' is not one of media, "),
        ([{**ROW, "dtype": "float8"}], "row 1: dtype 'float8' is not one of bfloat16, "),
        ([{**ROW, "head_dim": "64"}], "row 1: head_dim is '64', must be of type int"),
        ([{**ROW, "num_stages": True}], "row 1: num_stages is True, must be of type int"),
        ([{**ROW, "num_stages": 0}], "row 1: num_stages 0 is not one of 1, 2"),
        ([{**ROW, "operator": "resampler", "block": 24}], "row 1: block 24 is not one of 16, 32, 64"),
        ([{**ROW, "operator": "row", "block": 16}], "row 1: block 16 is not one of 1$"),
        ([{**ROW, "block": 64}], "row 1: block 64 is not one of 16, 32$"),
        ([{**ROW, "num_warps": 8}], "row 1: num_warps 8 is not one of 4$"),
        ([ROW, {**ROW, "num_stages": 2}], "row 2: there is another row for media sm_90 64 bfloat16"),
        ([{**ROW, "architecture": "sm_80"}], "has rows for sm_80, but none for sm_90"),
    ],
)
def test_a_wrong_file_is_refused_and_replaces_nothing(content: Any, message: str, tmp_path: Path) -> None:
    before, file = dict(backend.TABLE), write(tmp_path, content)
    with pytest.raises(LaunchFileError, match=message) as caught:
        load_launches(file)
    assert str(caught.value).startswith(str(file))
    assert before == backend.TABLE


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchFileError, match=r"/none\.json cannot be read: No such file"):
        load_launches(tmp_path / "none.json")


def test_a_card_has_the_file_with_its_name(tmp_path: Path) -> None:
    assert shipped_file(CARD, tmp_path) is None
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text("[]")
    assert shipped_file(CARD, tmp_path) == tmp_path / "nvidia-h100-80gb-hbm3.json"
    assert shipped_file("NVIDIA H200", tmp_path) is None


def test_the_files_of_the_distribution_can_be_read() -> None:
    assert FOLDER.is_dir()
    for file in FOLDER.glob("*.json"):
        read_launches(file)


def test_what_the_benchmark_finds_can_be_read(tmp_path: Path) -> None:
    """Read the files of a card on which no launch is faster, and of one on which those with three stages are."""
    tasks = [*tuning.tasks(SIZES["quick"])]
    for fastest, operators in ((None, set()), (3, {"media", "paged_decode", "paged_prefill", "int8"})):
        rows = {each.key: row(each, fastest) for each in tasks}
        file = write(tmp_path, tuning.faster_launches(tasks, rows, "sm_90"))
        assert {key[0] for key in read_launches(file)} == operators
        assert load_launches(file) == len(read_launches(file))
    assert launch_config("media", 16, torch.bfloat16) == Launch(16, 4, 3)


def row(tried: Task, fastest: int | None) -> Row:
    """Return the row of a launch, whose time is half of the others' with this number of stages."""
    assert tried.launch is not None
    value = 5.0 if tried.launch["num_stages"] == fastest else 10.0
    return Row(stage=tried.stage, case=tried.case, name=tried.name, value=value)
