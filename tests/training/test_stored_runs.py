"""Tests of the files of finished runs."""

from __future__ import annotations

import json
from pathlib import Path

from training.stored_runs import read_run, write_run

SETTINGS = {"steps": 3, "config": {"rate": 0.1}}


def test_a_run_is_read_back_with_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "base-0.json"
    assert read_run(file, SETTINGS) is None
    write_run(file, SETTINGS, {"correct": "01"})
    assert read_run(file, SETTINGS) == {"correct": "01"}
    assert read_run(file, {"config": {"rate": 0.1}, "steps": 3}) == {"correct": "01"}
    assert list(file.parent.iterdir()) == [file]


def test_a_run_with_other_settings_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "base-0.json"
    write_run(file, SETTINGS, {"correct": "01"})
    assert read_run(file, {**SETTINGS, "steps": 4}) is None
    assert read_run(file, {**SETTINGS, "config": {"rate": 0.2}}) is None


def test_a_file_states_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "base-0.json"
    write_run(file, SETTINGS, {})
    run = json.loads(file.read_text(encoding="utf-8"))
    assert run["settings"] == SETTINGS
    assert {"processor", "threads", "load", "torch"} <= run["machine"].keys()
