"""Evaluations leave out one example of each label with a query, and store the answers in the order of the examples."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest

from server.api.services import Services
from server.limits import admission
from server.quality import evaluation_runner, leave_one_out
from server.quality.evaluation import left_out_together
from server.wire import Score
from tests.server.evaluations import COLOURS, LABEL_OF, MEDIA, logprobs_of, run_evaluation
from tests.server.fakes import FakeClient

pytestmark = pytest.mark.anyio


async def test_labels_keep_their_shares_when_an_example_is_left_out(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    """A label would be rarer among the shots of its own examples than in a request."""
    await run_evaluation(http, services, k=[4], strategies=["random"], seeds=[1, 2], methods=["in_context"])
    for request in client.scores:
        assert Counter(LABEL_OF[digest] for digest in request.prompt.media[:-1]) == {"warm": 2, "cold": 2}


@pytest.mark.parametrize("k", [2, 4])
async def test_balanced_shots_have_each_label_as_in_a_request(
    http: httpx.AsyncClient, client: FakeClient, services: Services, k: int
) -> None:
    await run_evaluation(http, services, k=[k], strategies=["balanced"], seeds=[1, 2, 3], methods=["in_context"])
    for request in client.scores:
        counts = Counter(LABEL_OF[digest] for digest in request.prompt.media[:-1])
        assert counts == {"warm": k / 2, "cold": k / 2}


async def test_answers_are_stored_by_example(http: httpx.AsyncClient, client: FakeClient, services: Services) -> None:
    """Although concurrent queries end in another order."""
    slow = asyncio.Event()
    score = client.score

    async def score_later(request: Score, media: Any) -> Any:
        if request.prompt.media[-1] == MEDIA["red"].digest:
            await slow.wait()
        elif request.prompt.media[-1] == MEDIA["navy"].digest:
            slow.set()
        return await score(request, media)

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        is_red = request.prompt.media[-1] == MEDIA["red"].digest
        return logprobs_of(0.1 if is_red else 0.9, request, candidate)

    client.score = score_later  # type: ignore[method-assign]
    client.logprobs = logprobs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_runner, "MAX_TIMED", 1)
        patch.setattr(admission, "QUIET_SECONDS", 0.0)  # two queries at once
        evaluation = await run_evaluation(http, services, k=[1], strategies=["first"], methods=["in_context"])
    (cell,) = evaluation["cells"]
    assert dict(zip(evaluation["left_out"], cell["is_correct"], strict=True)) == {
        colour: colour != "red" for colour in COLOURS
    }


async def test_queries_are_prepared_in_a_thread(
    http: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 10,000 queries and 1,024 labels, it takes seconds."""
    threads: list[threading.Thread] = []

    def recorded(answers: Sequence[str]) -> Callable[[int], list[int]]:
        threads.append(threading.current_thread())
        return left_out_together(answers)

    monkeypatch.setattr(leave_one_out, "left_out_together", recorded)
    evaluation = await run_evaluation(http, services, k=[1], strategies=["first"], methods=["in_context"])
    assert evaluation["status"] == "completed"
    assert threads
    assert threading.main_thread() not in threads
