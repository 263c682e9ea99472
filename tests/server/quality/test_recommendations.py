"""Classifications that leave the method to the server use what the latest evaluation of the set recommends."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import update

from server.api.services import Services
from server.errors import EvaluationNotFound
from server.fewshot.confidence import Confidence
from server.quality import recommendations
from server.quality.evaluation_records import CellRow
from server.quality.evaluation_store import Changes, Evaluations
from server.quality.recommendations import KEPT_SECONDS, Found, Recommendations, Recommended
from server.schemas.fewshot import ExamplesFields
from server.settings import Settings
from server.store.examples import Examples
from server.store.records import NewExample, SupportSet
from server.wire import Score
from tests.server.evaluations import (
    EXAMPLES,
    MEDIA,
    constant_share,
    logprobs_of,
    read,
    run_evaluation,
    vectors_by_label,
)
from tests.server.fakes import TOKENIZER, FakeClient

pytestmark = pytest.mark.anyio

# fields of a recommendation that are not those of a classification


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_media_per_request=6)


@pytest.fixture
async def services(app: FastAPI, client: FakeClient) -> Services:
    """The language model is always right, and likeness is of digests: it is worth nothing."""
    client.logprobs = constant_share(0.9)
    services: Services = app.state.services
    await services.support_sets.create("colours", EXAMPLES)
    return services


async def post(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"examples": {"support_set": "colours"}, "query": {"image": MEDIA["red"].id}, **fields}
    return await http.post("/v1/classify", json=body)


async def answer_to(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await post(http, **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def classify(http: httpx.AsyncClient, **fields: Any) -> tuple[str, str | None, int]:
    """Return the method, the strategy and the number of shots."""
    answer = await answer_to(http, **fields)
    return answer["method"], answer["fewshot"]["strategy"], len(answer["fewshot"]["shots"])


async def test_auto_is_what_the_latest_evaluation_recommends(http: httpx.AsyncClient, services: Services) -> None:
    assert (await classify(http))[0] != "in_context"
    await run_evaluation(http, services, k=[2], strategies=["balanced"])
    assert await classify(http) == ("in_context", "balanced", 2)
    await run_evaluation(http, services, k=[1], strategies=["random"], methods=["in_context", "knn"])
    assert await classify(http) == ("in_context", "random", 1)


async def test_auto_does_not_follow_an_evaluation_that_did_not_measure_likeness(
    http: httpx.AsyncClient, services: Services
) -> None:
    """With a single example per label, leave-one-out measures only what the model knows without an example."""
    removed = [example.id for example in EXAMPLES if example.id not in ("red", "blue")]
    await services.support_sets.remove_examples("colours", removed)
    evaluation = await run_evaluation(http, services, k=[1], strategies=["first"])
    assert [row["method"] for row in evaluation["summary"]] == ["in_context"]
    assert evaluation["recommendation"] is None
    assert (await classify(http))[0] == "nearest_mean"
    evaluation = await run_evaluation(http, services, k=[1], strategies=["first"], methods=["in_context"])
    assert evaluation["recommendation"]["request"]["method"] == "in_context", "the evaluation was meant for it"
    assert (await classify(http))[0] == "nearest_mean"


async def test_one_label_that_can_be_left_out_recommends_nothing(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    """A model that always answers with that label would be right about all examples that can be left out."""
    client.logprobs = lambda request, candidate: [
        math.log(0.9 if TOKENIZER.decode(candidate).strip() == "warm" else 0.1)
    ]
    more = [NewExample(id=label, media=(MEDIA["navy"],), label=label) for label in ("dark", "light")]
    removed = ["tomato", "navy", "skyblue"]
    await services.support_sets.put_examples("colours", more)
    await services.support_sets.remove_examples("colours", removed)
    evaluation = await run_evaluation(http, services, k=[0, 1], strategies=["first"])
    assert evaluation["queries"] == 5
    assert evaluation["baseline"]["accuracy"] == 2 / 5
    assert evaluation["recommendation"] is None
    assert (await classify(http))[0] == "nearest_mean"


async def test_no_threshold_is_fitted_without_examples_of_each_label(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    hot = NewExample(id="new", media=(MEDIA["red"],), label="hot")
    await services.support_sets.put_examples("colours", [hot])
    evaluation = await run_evaluation(http, services, k=[2], strategies=["balanced"])
    assert (evaluation["queries"], evaluation["recommendation"]["request"]["method"]) == (6, "in_context")
    assert (await classify(http))[0] == "in_context"
    for target in ("target_accuracy", "target_coverage"):
        response = await post(http, **{target: 0.5})
        assert (response.status_code, response.json()["error"]["param"]) == (422, target)
        assert "of a set with two examples of each label" in response.json()["error"]["message"]


async def test_auto_follows_the_form_of_the_prompts_that_were_evaluated(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    evaluated = await run_evaluation(http, services, k=[2], strategies=["balanced"], shots_attend="alone")
    recommendation = evaluated["recommendation"]["request"]
    assert (recommendation["method"], recommendation["shots_attend"]) == ("in_context", "alone")
    assert {score.prompt.shots_attend for score in client.scores} == {"alone"}
    answer = await answer_to(http)
    assert (answer["method"], answer["usage"]["fewshot_details"]["shots_attend"]) == ("in_context", "alone")
    other = await answer_to(http, shots_attend="previous")
    assert "shots_attend" not in other["usage"]["fewshot_details"]


async def test_a_recommendation_repeats_how_its_prompts_were_written_and_weighed(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    """A classification with all of its fields computes what was evaluated."""
    template = {"shot": "{media}{label}", "query": "{media}"}
    repeated = {"template": template, "normalisation": "mean", "permutations": 2, "candidates": ["warm", "cold"]}
    evaluated = await run_evaluation(http, services, k=[2], strategies=["balanced"], seeds=[7], **repeated)
    fields = evaluated["recommendation"]["request"]
    assert {name: fields[name] for name in repeated} == repeated
    assert (fields["method"], fields["seed"]) == ("in_context", 7)
    of_evaluation, client.scores = client.scores, []
    await answer_to(http, **fields)
    assert client.scores[0].prompt.token_ids in [score.prompt.token_ids for score in of_evaluation]


async def test_a_recommendation_of_a_method_without_a_prompt_can_be_sent_as_it_is(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    client.vectors = vectors_by_label()
    repeated = {"candidates": ["warm", "cold"], "template": "vqa"}
    evaluated = await run_evaluation(http, services, methods=["knn"], normalisation="mean", **repeated)
    fields = evaluated["recommendation"]["request"]
    assert "normalisation" not in fields
    assert (await answer_to(http, **fields))["method"] == "knn"


async def test_a_request_that_selects_shots_keeps_its_selection(http: httpx.AsyncClient, services: Services) -> None:
    await run_evaluation(http, services, k=[2], strategies=["balanced"])
    selection = {"support_set": "colours", "k": 1, "strategy": "first"}
    assert await classify(http, examples=selection) == ("in_context", "first", 1)


async def test_a_recommendation_is_for_its_labels_and_its_version(http: httpx.AsyncClient, services: Services) -> None:
    await run_evaluation(http, services, k=[2], strategies=["balanced"], methods=["in_context", "knn"])
    assert (await classify(http, candidates=["cold", "warm"]))[0] == "in_context"
    # "hot" has no example, so likeness cannot answer
    assert await classify(http, candidates=["cold", "warm", "hot"]) == ("in_context", "balanced", 4)
    await services.support_sets.put_examples("colours", [NewExample(id="new", media=(MEDIA["red"],), label="warm")])
    assert (await classify(http))[0] != "in_context"


async def test_an_explicit_method_is_used_whatever_is_recommended(http: httpx.AsyncClient, services: Services) -> None:
    await run_evaluation(http, services, k=[2], strategies=["balanced"])
    assert (await classify(http, method="knn"))[0] == "knn"


async def test_an_evaluation_of_other_prompts_recommends_none_of_them(
    http: httpx.AsyncClient, services: Services
) -> None:
    """A request that says nothing of its prompts would not have those that were evaluated."""
    await run_evaluation(http, services, k=[2], strategies=["balanced"], methods=["in_context", "knn"], seed=5)
    assert (await classify(http))[0] == "in_context"
    await run_evaluation(
        http, services, k=[2], strategies=["balanced"], methods=["in_context", "knn"], normalisation="mean"
    )
    assert (await classify(http))[0] != "in_context"


async def test_a_request_with_another_template_has_no_recommended_prompt(
    http: httpx.AsyncClient, services: Services
) -> None:
    await run_evaluation(http, services, k=[2], strategies=["balanced"], methods=["in_context", "knn"])
    assert (await classify(http, template="classification"))[0] == "in_context"
    assert (await classify(http, template={"shot": "{media}It is {label}."}))[0] != "in_context"
    twins = [replace(example, id=f"{example.id}-twin") for example in EXAMPLES]
    await services.support_sets.put_examples("colours", twins)
    await run_evaluation(http, services, methods=["knn"])
    assert (await classify(http, template={"shot": "{media}It is {label}."}))[0] == "knn"


async def test_what_was_found_in_periods_that_are_over_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    now, times_asked = 0.0, 0

    async def latest(support_set: str, version: int) -> None:
        nonlocal times_asked
        times_asked += 1

    monkeypatch.setattr(recommendations, "time", SimpleNamespace(monotonic=lambda: now))
    recommended = Recommendations(cast(Evaluations, SimpleNamespace(latest=latest, changes=Changes())))
    support_set = SupportSet(id="ss_1", name=None, version=1, examples=Examples())
    for period in (*range(5000), 0):
        now = period * KEPT_SECONDS
        for _ in range(2):
            await recommended.find(support_set, ["cat"])
    assert times_asked == 5001


def test_the_memory_of_what_was_found_has_the_texts_of_the_labels() -> None:
    labels = [f"{number} \U0001f600 {'x' * 1000}" for number in range(100)]
    examples = ExamplesFields(support_set="pets")
    entry = Found(Recommended("knn", examples, frozenset(labels), Confidence(1.0)))
    texts = sum(map(sys.getsizeof, labels))
    assert 400_000 < texts < entry.num_bytes < texts + 20_000
    assert Found(None).num_bytes < 2000


async def test_the_deletion_of_an_unknown_evaluation_is_no_change(services: Services) -> None:
    number = services.evaluations.changes.number
    with pytest.raises(EvaluationNotFound):
        await services.evaluations.delete("eval_unknown")
    assert services.evaluations.changes.number == number


def share_by_colour(request: Score, candidate: list[int]) -> list[float]:
    """The language model is wrong about one colour, and less sure of it than of the others."""
    is_wrong = request.prompt.media[-1] == MEDIA["tomato"].digest
    return logprobs_of(0.3 if is_wrong else 0.9, request, candidate)


async def test_auto_has_the_temperature_and_the_threshold_of_the_evaluation(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    client.logprobs = share_by_colour
    evaluation = await run_evaluation(http, services, k=[2], strategies=["balanced"], methods=["in_context", "knn"])
    recommended = evaluation["recommendation"]["request"]
    row = evaluation["summary"][1]
    assert [(point["coverage"], point["accuracy"]) for point in row["curve"]] == [
        (pytest.approx(5 / 6), 1.0),
        (1.0, pytest.approx(5 / 6)),
    ]
    assert recommended["temperature"] == row["temperature"] == evaluation["cells"][1]["temperature"] != 1.0
    for fields in dict[str, Any](), recommended:
        assert (await answer_to(http, **fields))["temperature"] == row["temperature"]
        for target in ({"target_accuracy": 0.85}, {"target_coverage": 0.7}):
            answer = await answer_to(http, **fields, **target)
            assert (answer["label"], answer["threshold"]) == ("warm", row["curve"][0]["threshold"])
            answer = await answer_to(http, **fields, **target, query={"image": MEDIA["tomato"].id})
            assert (answer["label"], answer["candidates"][0]["label"]) == (None, "cold")


async def test_an_evaluation_has_no_threshold_for_other_prompts(http: httpx.AsyncClient, services: Services) -> None:
    evaluation = await run_evaluation(http, services, k=[2], strategies=["balanced"], methods=["in_context"])
    recommended = evaluation["recommendation"]["request"]
    sent = {name: recommended[name] for name in ("examples", "method")} | {"target_accuracy": 0.7}
    assert (await answer_to(http, **sent))["label"] == "warm"
    changes: list[dict[str, Any]] = [
        {"examples": {**recommended["examples"], "k": 1}},
        {"examples": {**recommended["examples"], "seed": 1}},
        {"permutations": 2},
        {"template": "caption", "candidates": ["warm", "cold"]},
        {"method": "blend"},
        {"candidates": ["warm", "cold", "hot"]},
    ]
    for fields in changes:
        response = await post(http, **{**sent, **fields})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (422, "target_accuracy"), fields


async def test_an_evaluation_without_a_curve_has_no_threshold(http: httpx.AsyncClient, services: Services) -> None:
    """It was stored before there were any."""
    evaluation = await run_evaluation(http, services, k=[2], strategies=["balanced"], methods=["in_context", "knn"])
    cell = evaluation["cells"][1]
    old = {name: value for name, value in cell.items() if name not in ("temperature", "curve")}
    await services.database.write(
        lambda session, now: session.execute(update(CellRow).where(CellRow.index == 1).values(result=old))
    )
    row = (await read(http, evaluation["id"]))["summary"][1]
    assert (row["temperature"], row["curve"]) == (1.0, [])
    assert (await answer_to(http))["temperature"] == 1.0
    assert (await post(http, target_accuracy=0.5)).status_code == 422
