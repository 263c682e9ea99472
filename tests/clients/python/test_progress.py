"""The progress bar of an evaluation has the server's estimate of the remaining time, and none of its own."""

from __future__ import annotations

import io
import sys

import pytest

from flamboyance_client.evaluations import Evaluation, duration
from flamboyance_client.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def evaluation(status: str, queries_done: int, seconds_left: float | None) -> Evaluation:
    progress = {"queries": 1000, "queries_done": queries_done, "seconds_left": seconds_left}
    return Evaluation.parse({"id": "eval_1", "status": status, "progress": progress})


def test_the_bar_has_the_remaining_time_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(evaluation("queued", 0, None)) as show:
        show(evaluation("running", 0, None))
        show(evaluation("running", 1, None))
        show(evaluation("running", 500, 4000.0))
    first, *_, last = terminal.getvalue().strip().split("\r")
    assert ("left" in first, "<" in first) == (False, False)
    assert "waits for its turn" in terminal.getvalue()
    assert "prepares the examples" in terminal.getvalue()
    assert "500/1000" in last
    assert last.endswith(", about 67 min left]")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "1 s"), (1.4, "1 s"), (89, "89 s"), (120, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_times_are_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
