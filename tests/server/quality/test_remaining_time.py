"""The remaining time of an evaluation: unknown, then in proportion to the time of the answers so far."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import httpx
import pytest

from server.api.services import Services
from server.quality import evaluation_runner, remaining_time
from server.quality.evaluation import PromptSetting
from server.quality.remaining_time import MIN_ANSWERS, SHOTS_OF_A_QUERY, RemainingTime
from tests.server.evaluations import evaluate, read, running, wait_until_ended
from tests.server.fakes import FakeClient

pytestmark = pytest.mark.anyio

FIRST = PromptSetting("first", 0, 0)
SECOND = PromptSetting("random", SHOTS_OF_A_QUERY, 0)  # twice the work


@pytest.fixture
def _seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second after the one before."""
    seconds = itertools.count(5.0)
    monkeypatch.setattr(remaining_time, "time", SimpleNamespace(monotonic=lambda: next(seconds)))


@pytest.mark.usefixtures("_seconds")
def test_the_time_left_is_in_proportion_to_that_of_the_answers() -> None:
    remaining = RemainingTime([FIRST, SECOND, SECOND], 10)
    remaining.begin()
    remaining.begin()
    for _ in range(MIN_ANSWERS - 1):
        remaining.count(FIRST)
    assert remaining.seconds() is None
    remaining.count(FIRST)
    # eight answers in a second; two more, and ten with twice the work
    assert remaining.seconds() == round((2 + 2 * 10) / 8, 1)
    remaining.end(FIRST)
    assert remaining.seconds() == 2 * (2 * 10) / 8
    remaining.end(SECOND)
    assert remaining.seconds() == 0


def test_nothing_is_known_before_the_first_prompt() -> None:
    assert RemainingTime([], 10).seconds() is None


async def test_a_running_evaluation_has_the_time_that_is_left(
    http: httpx.AsyncClient, client: FakeClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_runner, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(remaining_time, "MIN_ANSWERS", 1)
    created = await evaluate(http, k=[1, 2], strategies=["first"])
    assert created["progress"]["seconds_left"] is None
    async with running(services):
        while (report := await read(http, created["id"]))["progress"]["seconds_left"] is None:
            assert report["status"] in ("queued", "running")
        assert report["status"] == "running"
        (head,) = (await http.get("/v1/evaluations")).json()["data"]
        assert "seconds_left" in head["progress"]
        ended = await wait_until_ended(http, created["id"])
    assert ended["progress"]["seconds_left"] is None
