"""Progress of a task, as lines of a log and as a bar on a terminal."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from model.zoo.progress import Progress


class Terminal(io.StringIO):
    """Standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_log_has_a_line_per_stage_and_per_quarter(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress("converting", num_stages=2)
    progress.stage("reading")
    assert list(progress.track(range(10))) == list(range(10))
    progress.stage("writing")
    assert caplog.messages == [
        "converting, 1/2: reading",
        "converting, 1/2: reading, 25 %",
        "converting, 1/2: reading, 50 %",
        "converting, 1/2: reading, 75 %",
        "converting, 2/2: writing",
    ]


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress("converting", num_stages=1)
    progress.stage("reading")
    assert list(progress.track(range(10))) == list(range(10))
    assert "converting, 1/1: reading:   0%" in terminal.getvalue()
    assert caplog.messages == ["converting, 1/1: reading"]
