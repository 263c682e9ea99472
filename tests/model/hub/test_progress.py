"""The progress of a download where no terminal shows a bar."""

from __future__ import annotations

import logging

import pytest
from tqdm.auto import tqdm

from model.hub import progress
from model.hub.progress import LogProgress


def test_bytes_are_logged_and_nothing_is_drawn(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    bar = LogProgress.of("me/model")
    with bar(total=80_000_000, unit="B") as transfer, bar(total=3, unit="it") as files:
        transfer.update(20_000_000)
        files.update(1)
        transfer.update(60_000_000)
    assert caplog.messages == ["downloading me/model: 20 of 80 MB", "downloading me/model: 80 of 80 MB"]
    assert capsys.readouterr() == ("", "")


def test_a_download_that_becomes_slow_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with LogProgress.of("me/model")(total=2_000_000_000, unit="B") as bar:
        for num_bytes in (1_000_000_000, 1_000_000, 1_000_000):
            bar.update(num_bytes)
    assert [message.split()[2] for message in caplog.messages] == ["1000", "1001", "1002"]


def test_no_thread_watches_what_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm, "monitor", None)
    bar = LogProgress.of("me/model")
    with bar(total=10, unit="B"):
        assert bar.monitor is None


def test_a_short_download_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with LogProgress.of("me/model")(total=10, unit="B") as bar:
        bar.update(10)
    assert caplog.messages == []
