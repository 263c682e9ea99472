"""Evaluations compare the forms of the prompt: each shot reads those before it, or it attends alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from server.api.services import Services
from server.quality.evaluation_records import CellRow
from server.wire import Score
from tests.server.evaluations import MEDIA, evaluate, logprobs_of, read, run_evaluation, running, wait_until_ended
from tests.server.fakes import FakeClient

pytestmark = pytest.mark.anyio

BOTH = ["previous", "alone"]
IN_CONTEXT: dict[str, Any] = {"strategies": ["balanced"], "methods": ["in_context"]}


@pytest.fixture(autouse=True)
def better_alone(client: FakeClient) -> None:
    """The model is right if each shot attends alone, and wrong otherwise."""

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        return logprobs_of(0.9 if request.prompt.shots_attend == "alone" else 0.4, request, candidate)

    client.logprobs = logprobs


async def test_each_form_has_a_row_with_its_latency(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    evaluation = await run_evaluation(http, services, **IN_CONTEXT, k=[0, 2], shots_attend=BOTH)
    assert evaluation["status"] == "completed"
    rows = [(row["k"], row["shots_attend"], row["accuracy"]) for row in evaluation["summary"]]
    assert rows == [(0, "previous", 0.0), (2, "previous", 0.0), (2, "alone", 1.0)]
    assert [cell["shots_attend"] for cell in evaluation["cells"]] == ["previous", "previous", "alone"]
    forms = Counter((len(score.prompt.media) - 1, score.prompt.shots_attend) for score in client.scores)
    assert forms == {(0, "previous"): 6, (2, "previous"): 6, (2, "alone"): 6}
    for row, cell in zip(evaluation["summary"], evaluation["cells"], strict=True):
        assert row["latency"] == cell["latency"]
        assert (row["latency"]["queries"], row["latency"]["median_seconds"] > 0) == (6, True)


async def test_a_method_without_a_prompt_has_no_form(http: httpx.AsyncClient, services: Services) -> None:
    evaluation = await run_evaluation(http, services, k=[1], methods=["knn", "blend"], shots_attend=BOTH)
    rows = [(row["method"], row["shots_attend"]) for row in evaluation["summary"]]
    assert Counter(rows) == {("knn", None): 1, ("blend", "previous"): 2, ("blend", "alone"): 2}
    assert evaluation["summary"][0]["latency"] == {"queries": 0, "median_seconds": None, "p90_seconds": None}


async def test_auto_follows_the_form_that_is_recommended(http: httpx.AsyncClient, services: Services) -> None:
    compared = {**IN_CONTEXT, "methods": ["in_context", "knn"]}
    evaluation = await run_evaluation(http, services, **compared, k=[2], shots_attend=BOTH)
    recommended = evaluation["recommendation"]
    request = recommended["request"]
    assert (request["shots_attend"], recommended["accuracy"]) == ("alone", 1.0)
    assert "in_context by balanced with k=2 and shots that attend alone has" in recommended["reason"]
    (alone,) = (row for row in evaluation["summary"] if row["shots_attend"] == "alone")
    query = {"image": MEDIA["red"].id}
    sent = {name: request[name] for name in ("examples", "method", "shots_attend")}
    for fields in ({"examples": {"support_set": "colours"}}, sent):
        response = await http.post("/v1/classify", json={**fields, "query": query, "target_accuracy": 0.9})
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["usage"]["fewshot_details"]["shots_attend"] == "alone"
        assert (answer["label"], answer["temperature"]) == ("warm", alone["temperature"])
    other = {**sent, "shots_attend": "previous", "target_accuracy": 0.9}
    response = await http.post("/v1/classify", json={**other, "query": query})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "target_accuracy")


async def test_a_control_has_the_first_form(http: httpx.AsyncClient, client: FakeClient, services: Services) -> None:
    fields: dict[str, Any] = {**IN_CONTEXT, "k": [4], "controls": ["shuffled_labels"]}
    for forms in (BOTH[::-1], BOTH):
        evaluation = await run_evaluation(http, services, **fields, shots_attend=forms)
        (control,) = (cell for cell in evaluation["cells"] if cell["control"])
        assert control["shots_attend"] == client.scores[-1].prompt.shots_attend == forms[0]
        whole = evaluation["note"].split(" has an accuracy")[0]
        assert whole.endswith("shots that attend alone") == (forms[0] == "alone")


async def test_orders_that_are_equal_are_not_drawn_again(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    fields: dict[str, Any] = {"strategies": ["first"], "methods": ["in_context"], "k": [2], "seeds": [0, 1, 2]}
    evaluation = await run_evaluation(http, services, **fields, permutations=2, shots_attend=BOTH)
    assert [(row["shots_attend"], row["seeds"]) for row in evaluation["summary"]] == [("previous", 3), ("alone", 1)]
    assert Counter(score.prompt.shots_attend for score in client.scores) == {"previous": 6 * 2 * 3, "alone": 6}


async def test_an_old_evaluation_has_the_form_of_its_plan(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    """When there was one form per evaluation, it was stored in the plan and not in the cells."""
    made = await run_evaluation(http, services, **IN_CONTEXT, k=[0, 2], shots_attend="alone")
    stored = await services.evaluations.get(made["id"])
    cells = [{name: cell[name] for name in cell if name != "shots_attend"} for cell in stored.plan["settled"]["cells"]]
    settled = stored.plan["settled"] | {"cells": cells, "shots_attend": "alone"}
    old = await services.evaluations.create(stored.support_set, stored.version, stored.plan | {"settled": settled})
    num_scores = len(client.scores)
    async with running(services):
        await wait_until_ended(http, old.id)
    assert {score.prompt.shots_attend for score in client.scores[num_scores + 6 :]} == {"alone"}
    result = {name: value for name, value in made["cells"][1].items() if name != "shots_attend"}
    is_the_cell = (CellRow.evaluation_id == old.id, CellRow.index == 1)
    await services.database.write(
        lambda session, now: session.execute(update(CellRow).where(*is_the_cell).values(result=result))
    )
    report = await read(http, old.id)
    assert [(row["k"], row["shots_attend"]) for row in report["summary"]] == [(0, "previous"), (2, "alone")]
    assert report["recommendation"]["request"]["shots_attend"] == "alone"


@pytest.mark.parametrize(
    ("forms", "status", "param"),
    [
        ("next", 422, "shots_attend"),
        (["previous", "next"], 422, "shots_attend[1]"),
        ([], 400, "shots_attend"),
        (1, 422, "shots_attend"),
    ],
)
async def test_a_form_that_does_not_exist_is_refused(
    http: httpx.AsyncClient, services: Services, forms: Any, status: int, param: str
) -> None:
    response = await http.post("/v1/support_sets/colours/evaluate", json={"shots_attend": forms})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize("forms", [["alone"], BOTH])
async def test_one_form_that_is_impossible_is_refused(http: httpx.AsyncClient, services: Services, forms: Any) -> None:
    fields = {"template": {"shot": "It is {label}"}, "shots_attend": forms}
    response = await http.post("/v1/support_sets/colours/evaluate", json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (422, "shots_attend")


async def test_a_repeated_form_runs_once(http: httpx.AsyncClient, services: Services) -> None:
    created = await evaluate(http, **IN_CONTEXT, k=[2], shots_attend=["alone", "alone"])
    assert created["progress"]["cells"] == 1
