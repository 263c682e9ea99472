"""Tests of a run's progress: off a terminal, the first and the last step are lines of the log, and some in between."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.config import ConfigError
from training.progress import LINE_SECONDS, ProgressReporter
from training.step import StepReport


def report(step: int) -> StepReport:
    return StepReport(
        step=step, losses={"pages": 4.25}, gradient_norm=1.0, learning_rate=1e-3, num_tokens=10, seconds=12.0
    )


def test_off_a_terminal_the_progress_is_lines_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    # only the module's: an event loop in another thread would wait for hours
    monkeypatch.setattr("training.progress.time", SimpleNamespace(monotonic=lambda: now))
    with ProgressReporter(tmp_path, 6, 0, enabled=True) as reporter:
        for step in range(6):
            reporter.report_step(report(step))
            now += LINE_SECONDS / 2 - 1
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "step 1 of 6: pages 4.250, 12.00 s per step, 0:01:00 remaining"
    assert [line.partition(":")[0] for line in lines] == ["step 1 of 6", "step 4 of 6", "step 6 of 6"]


def test_only_the_first_process_writes_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with ProgressReporter(tmp_path, 1, 0, enabled=False) as reporter:
        reporter.report_step(report(0))
    assert not caplog.records


def test_curves_without_the_extra_are_refused_with_the_command_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ConfigError, match=r"install the extra: pip install '\.\[training\]'$"):
        ProgressReporter(tmp_path, 1, 0, enabled=True)
