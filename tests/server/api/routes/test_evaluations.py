"""The routes of evaluations: lists, versions, defaults and invalid requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy import update

from server.api.services import Services
from server.quality.evaluation_records import CellRow
from server.quality.evaluation_store import MAX_UNFINISHED
from server.settings import Settings
from server.store.records import NewExample
from tests.server.evaluations import EXAMPLES, MEDIA, evaluate, read, run_evaluation, running, wait_until_ended
from tests.server.fakes import FakeClient

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_media_per_request=6)


@pytest.fixture
async def services(app: FastAPI) -> Services:
    services: Services = app.state.services
    await services.support_sets.create("colours", EXAMPLES)
    return services


async def test_a_deleted_evaluation_is_not_found(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    evaluation = await run_evaluation(http, services, k=[1], strategies=["first"])
    response = await http.delete(f"/v1/evaluations/{evaluation['id']}")
    assert response.json() == {"id": evaluation["id"], "object": "evaluation", "deleted": True}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
        gone = await http.request(method, f"/v1/evaluations/{evaluation['id']}{path}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "evaluation_not_found")


async def test_a_list_continues_after_the_last_id(http: httpx.AsyncClient, services: Services) -> None:
    created = [(await evaluate(http, k=[1], strategies=["first"]))["id"] for _ in range(3)]
    page = (await http.get("/v1/evaluations", params={"limit": 2})).json()
    assert ([evaluation["id"] for evaluation in page["data"]], page["has_more"]) == (created[:2], True)
    rest = (await http.get("/v1/evaluations", params={"after": page["last_id"]})).json()
    assert ([evaluation["id"] for evaluation in rest["data"]], rest["has_more"]) == (created[2:], False)
    other_set = (await http.get("/v1/evaluations", params={"support_set": "ss_0"})).json()
    assert other_set["data"] == []


async def test_the_evaluations_of_a_set_are_listed_by_its_name_and_its_id(
    http: httpx.AsyncClient, services: Services
) -> None:
    await services.support_sets.create("others", EXAMPLES)
    created = await evaluate(http, k=[1], strategies=["first"])
    set_id = created["support_set"]

    async def listed(name: str) -> list[str]:
        response = await http.get("/v1/evaluations", params={"support_set": name})
        assert response.status_code == 200, response.text
        return [evaluation["id"] for evaluation in response.json()["data"]]

    assert await listed("colours") == await listed(set_id) == [created["id"]]
    assert await listed("others") == []
    await services.support_sets.delete("colours")
    assert await listed(set_id) == [created["id"]]
    unknown = await http.get("/v1/evaluations", params={"support_set": "colours"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "support_set_not_found")


async def test_the_requested_version_is_evaluated(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    await services.support_sets.put_examples("colours", [NewExample(id="new", media=(MEDIA["red"],), label="hot")])
    assert (await evaluate(http, version=1))["labels"] == ["warm", "cold"]
    assert (await evaluate(http))["labels"] == ["warm", "cold", "hot"]


async def test_defaults_fit_the_support_set(http: httpx.AsyncClient, services: Services) -> None:
    """With five other examples and six media per request, k is at most five."""
    created = await evaluate(http)
    cells = (await services.evaluations.get(created["id"])).plan["settled"]["cells"]
    assert [cell["method"] for cell in cells if cell["k"] is None] == ["nearest_mean", "knn", "linear"]
    with_prompt = [cell for cell in cells if cell["k"] is not None]
    assert sorted({cell["k"] for cell in with_prompt}) == [0, 1, 2, 4]
    assert {cell["strategy"] for cell in with_prompt} == {"first", "random", "rices_image"}
    assert {cell["method"] for cell in with_prompt} == {"in_context", "blend"}


async def test_the_only_example_of_a_label_is_no_query(http: httpx.AsyncClient, services: Services) -> None:
    await services.support_sets.put_examples("colours", [NewExample(id="new", media=(MEDIA["red"],), label="hot")])
    created = await evaluate(http)
    plan = (await services.evaluations.get(created["id"])).plan["settled"]
    assert {cell["method"] for cell in plan["cells"]} == {"in_context", "nearest_mean", "knn", "linear", "blend"}
    assert created["labels"] == ["warm", "cold", "hot"]
    assert (created["queries"], created["examples"], "new" in created["left_out"]) == (6, 7, False)
    assert created["note"].startswith("The label 'hot' has a single example,")


@pytest.mark.parametrize(
    ("field", "obstacle"),
    [
        ("label", "leaves out one of several examples of a label, and fewer than two labels have two"),
        ("text", "needs two examples of each candidate to leave one out, and 'hot' has fewer"),
    ],
)
async def test_methods_by_likeness_cannot_leave_out_the_only_examples(
    http: httpx.AsyncClient, services: Services, field: str, obstacle: str
) -> None:
    hot = NewExample(id="a", media=(MEDIA["red"],), **{field: "hot"})  # type: ignore[arg-type]
    cold = NewExample(id="b", media=(MEDIA["blue"],), **{field: "cold"})  # type: ignore[arg-type]
    await services.support_sets.create("few", [hot, cold])
    response = await http.post("/v1/support_sets/few/evaluate", json={"methods": ["knn"]})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["message"]) == (400, "methods", f"knn {obstacle}")
    async with running(services):
        created = (await http.post("/v1/support_sets/few/evaluate", json={"k": [1]})).json()
        evaluation = await wait_until_ended(http, created["id"])
    assert {row["method"] for row in evaluation["summary"]} == {"in_context"}
    assert evaluation["queries"] == 2
    assert evaluation["recommendation"] is None
    assert evaluation["note"].startswith("No setting is recommended: leave-one-out could measure in_context alone")
    assert "Add a second example of each label." in evaluation["note"]


async def test_cells_that_were_stored_before_there_were_methods_are_in_context(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    evaluation = await run_evaluation(http, services, k=[1], strategies=["first"], methods=["in_context"])
    stored = await services.evaluations.get(evaluation["id"])
    plan = stored.plan["settled"] | {"cells": [{"strategy": "first", "k": 1, "seed": 0}]}
    old = await services.evaluations.create(stored.support_set, stored.version, stored.plan | {"settled": plan})
    async with running(services):
        assert (await wait_until_ended(http, old.id))["cells"][0]["method"] == "in_context"
    result = {name: value for name, value in evaluation["cells"][0].items() if name != "method"}
    await services.database.write(lambda session, now: session.execute(update(CellRow).values(result=result)))
    assert (await read(http, old.id))["summary"][0]["method"] == "in_context"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"k": [6]}, 400, "k"),
        ({"k": [-1]}, 400, "k[0]"),
        ({"methods": ["auto"]}, 422, "methods[0]"),
        ({"strategies": ["best"]}, 422, "strategies[0]"),
        ({"strategies": ["random"], "order": "similar_last"}, 400, "order"),
        ({"candidates": ["warm"]}, 400, "candidates"),
        ({"candidates": ["warm", "cold", "warm"]}, 400, "candidates[2]"),
        ({"template": "poem"}, 400, "template"),
        ({"template": {"shot": "{question}\0 {label}"}}, 400, "template"),  # PostgreSQL cannot read it
        ({"candidates": ["warm", "co\0ld"]}, 400, "candidates"),
        ({"seeds": []}, 400, "seeds"),
        ({"seeds": list(range(32)), "k": [1, 2, 3, 4, 5], "strategies": ["random", "balanced"]}, 400, "k"),
        ({"max_queries": 0}, 400, "max_queries"),
        ({"controls": ["blind"]}, 422, "controls[0]"),
        ({"controls": ["text_only"], "methods": ["knn"]}, 400, "controls"),
        ({"controls": ["text_only"], "template": {"shot": "{question} {label}"}}, 400, "controls"),
        ({"version": 2}, 404, "version"),
        ({"shots": []}, 422, "shots"),
    ],
)
async def test_an_error_names_the_invalid_field(
    http: httpx.AsyncClient, services: Services, fields: dict[str, Any], status: int, param: str | None
) -> None:
    response = await http.post("/v1/support_sets/colours/evaluate", json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_more_shots_than_a_request_may_have_are_refused(http: httpx.AsyncClient, services: Services) -> None:
    more = [NewExample(id=f"new {n}", media=(MEDIA["red"],), label="warm") for n in range(3)]
    await services.support_sets.put_examples("colours", more)
    assert (await evaluate(http, k=[5]))["status"] == "queued"
    response = await http.post("/v1/support_sets/colours/evaluate", json={"k": [6]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "k")
    assert "at most 6 media" in response.json()["error"]["message"]


async def test_an_example_without_an_answer_is_refused(http: httpx.AsyncClient, services: Services) -> None:
    await services.support_sets.put_examples("colours", [NewExample(id="unlabelled", media=(MEDIA["red"],))])
    response = await http.post("/v1/support_sets/colours/evaluate", json={})
    assert (response.status_code, "'unlabelled'" in response.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("template", "lack"),
    [
        ("classification", "the template 'classification' has {media}, but the example 'a' has none"),
        ({"shot": "Q: {question} A: {label}"}, "the template 'custom' has {question}, but the example 'a' has none"),
        ({"shot": "{text} is {label}"}, None),
    ],
)
async def test_a_template_that_the_queries_do_not_fill_is_refused(
    http: httpx.AsyncClient, services: Services, template: Any, lack: str | None
) -> None:
    examples = [NewExample(id=name, media=(), text=name, label=name) for name in ("a", "b")]
    await services.support_sets.create("texts", examples)
    response = await http.post("/v1/support_sets/texts/evaluate", json={"template": template})
    if lack is None:
        assert response.status_code == 202
    else:
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["message"]) == (400, "template", lack)


@pytest.mark.parametrize("template", [{"shot": "It is {label}"}, {"shot": "{media}{label}", "query": "Look: {media}"}])
async def test_shots_that_cannot_attend_alone_are_refused(
    http: httpx.AsyncClient, services: Services, template: dict[str, Any]
) -> None:
    fields = {"template": template, "shots_attend": "alone"}
    response = await http.post("/v1/support_sets/colours/evaluate", json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (422, "shots_attend")


async def test_a_set_of_one_example_cannot_be_evaluated(http: httpx.AsyncClient, services: Services) -> None:
    await services.support_sets.create("single", [NewExample(id="a", media=(MEDIA["red"],), label="warm")])
    response = await http.post("/v1/support_sets/single/evaluate", json={})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "support_set")
    assert error["message"] == "an evaluation needs at least two examples, the support set has 1"


async def test_a_set_of_one_label_cannot_be_evaluated(http: httpx.AsyncClient, services: Services) -> None:
    examples = [NewExample(id=name, media=(MEDIA["red"],), label="warm") for name in "ab"]
    await services.support_sets.create("single", examples)
    response = await http.post("/v1/support_sets/single/evaluate", json={})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "candidates")
    assert error["message"] == "all examples have the answer 'warm', an evaluation needs a second candidate"


async def test_a_full_queue_refuses_before_a_body_or_a_set_is_read(
    http: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(MAX_UNFINISHED):
        await services.evaluations.create("ss_0", 1, {}, f"client {number}")
    refused = [await http.post("/v1/support_sets/colours/evaluate", json={})]
    monkeypatch.setattr(services.support_sets, "get_version", None)
    refused.append(await http.post("/v1/support_sets/colours/evaluate", content=b"this is not even JSON"))
    assert [(r.status_code, r.json()["error"]["code"]) for r in refused] == [(503, "overloaded")] * 2


class TestNul:
    """PostgreSQL has no text with a NUL, and fails where SQLite finds nothing."""

    @pytest.fixture
    def settings(self, settings: Settings, database_url: str) -> Settings:
        return settings.model_copy(update={"database": SecretStr(database_url)})

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "?after=%00", 400),
            ("GET", "?support_set=%00", 400),
            ("GET", "/%00", 404),
            ("DELETE", "/%00", 404),
            ("POST", "/%00/cancel", 404),
        ],
    )
    async def test_a_nul_is_a_client_error(self, http: httpx.AsyncClient, method: str, path: str, status: int) -> None:
        assert (await http.request(method, f"/v1/evaluations{path}")).status_code == status
