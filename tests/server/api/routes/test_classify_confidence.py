"""Temperatures of `/v1/classify`, and targets below which an answer has no label."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from server.fewshot import comparison
from server.fewshot.confidence import DEFAULT_TEMPERATURES
from server.fewshot.methods import METHODS
from server.media.source import encoded
from server.settings import Settings
from tests.server.conftest import data_url, png
from tests.server.fakes import CONFIG, FakeClient

pytestmark = pytest.mark.anyio
# degrees; cats are around 0 and dogs around 90, but one cat and one dog look like the other
DEGREES = {
    "cat": {"red": 0, "darkred": 5, "tomato": 10, "salmon": 15, "coral": 65},
    "dog": {"green": 90, "darkgreen": 85, "lime": 80, "olive": 75, "teal": 25},
}
QUERIES = {"orange": -20, "brown": 45.2}
SHOTS = [{"image": data_url(png(colour)), "label": label} for label, of in DEGREES.items() for colour in of]
CLEAR = [
    shot
    for colour, shot in zip([c for of in DEGREES.values() for c in of], SHOTS, strict=True)
    if colour not in ("coral", "teal")
]


def vector(degrees: float) -> np.ndarray:
    values = np.zeros(CONFIG.vision.feature_dim, np.float32)
    values[:2] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return values


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_media_per_request=16)


@pytest.fixture(autouse=True)
def vectors(client: FakeClient) -> None:
    angles = {**DEGREES["cat"], **DEGREES["dog"], **QUERIES}
    client.vectors |= {encoded(png(name), "image", "").digest: vector(angle) for name, angle in angles.items()}


async def post(http: httpx.AsyncClient, query: str, **fields: Any) -> httpx.Response:
    body = {"shots": SHOTS, "query": {"image": data_url(png(query))}, "method": "nearest_mean", "truncate_shots": True}
    return await http.post("/v1/classify", json=body | fields)


async def classify(http: httpx.AsyncClient, query: str, **fields: Any) -> dict[str, Any]:
    answer = await post(http, query, **fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def refusal(http: httpx.AsyncClient, **fields: Any) -> tuple[int, str, str]:
    answer = await post(http, "orange", **fields)
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


@pytest.mark.parametrize("method", ["auto", "nearest_mean", "knn", "linear", "blend", "in_context"])
async def test_every_answer_has_a_label_without_a_target(http: httpx.AsyncClient, method: str) -> None:
    for query in QUERIES:
        body = await classify(http, query, method=method)
        assert (body["label"], body["threshold"]) == (body["candidates"][0]["label"], None)
        logs = np.array([sum(candidate["scores"].values()) for candidate in body["candidates"]]) / body["temperature"]
        shares = np.exp(logs) / np.exp(logs).sum()
        assert [candidate["probability"] for candidate in body["candidates"]] == pytest.approx(shares.tolist())


async def test_wrong_left_out_examples_raise_the_temperature(http: httpx.AsyncClient) -> None:
    sure, unsure = [await classify(http, "orange", shots=shots) for shots in (CLEAR, SHOTS)]
    assert sure["temperature"] <= DEFAULT_TEMPERATURES["nearest_mean"] < unsure["temperature"]
    assert sure["confidence"] > unsure["confidence"]
    assert sure["label"] == unsure["label"] == "cat"


async def test_a_label_with_a_single_example_has_the_default_temperature(http: httpx.AsyncClient) -> None:
    body = await classify(http, "orange", shots=SHOTS[:6])
    assert body["temperature"] == DEFAULT_TEMPERATURES["nearest_mean"]
    assert (await classify(http, "orange", method="in_context"))["temperature"] == 1.0


async def test_a_requested_temperature_is_used_and_changes_no_label(http: httpx.AsyncClient) -> None:
    plain = await classify(http, "orange")
    for temperature in (0.01, 3, 1000):
        for method in ("nearest_mean", "in_context"):
            body = await classify(http, "orange", temperature=temperature, method=method)
            assert body["temperature"] == temperature
        assert (await classify(http, "orange", temperature=temperature))["label"] == plain["label"]
    hot = await classify(http, "orange", temperature=1000)
    assert hot["confidence"] == pytest.approx(0.5, abs=0.05)
    assert hot["candidates"][0]["scores"] == plain["candidates"][0]["scores"]


@pytest.mark.parametrize("method", ["auto", "nearest_mean", "knn", "linear"])
async def test_only_a_sure_answer_has_a_label(http: httpx.AsyncClient, method: str) -> None:
    # a linear head is not sure enough of any of so few examples
    accuracy = [{"target_accuracy": 0.85}] if method in ("nearest_mean", "knn") else []
    for target in ({"target_coverage": 0.5}, *accuracy):
        sure, unsure = [await classify(http, query, **target, method=method) for query in QUERIES]
        assert sure["label"] == "cat"
        assert unsure["label"] is None
        assert 0 < sure["threshold"] == unsure["threshold"] < 1
        assert unsure["confidence"] <= unsure["threshold"] < sure["confidence"]
        assert unsure["candidates"] == (await classify(http, "brown", method=method))["candidates"]


async def test_a_target_that_all_answers_reach_leaves_out_no_label(http: httpx.AsyncClient) -> None:
    body = await classify(http, "brown", target_accuracy=0.5)
    assert (body["label"] is None, body["threshold"]) == (False, 0.0)


async def test_a_target_that_no_answer_reaches_leaves_out_every_label(http: httpx.AsyncClient) -> None:
    mixed = [{**shot, "label": ("cat", "dog")[index % 2]} for index, shot in enumerate(SHOTS)]
    body = await classify(http, "orange", shots=mixed, target_accuracy=0.99)
    assert (body["label"], body["threshold"], len(body["candidates"])) == (None, 1.0, 2)


async def test_the_threshold_of_a_set_is_fitted_once(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = await http.post("/v1/support_sets", json={"name": "pets", "examples": SHOTS})
    assert stored.status_code == 200, stored.text
    source = {"shots": [], "examples": {"support_set": "pets"}}
    first = await classify(http, "orange", **source, method="auto")
    monkeypatch.setattr(comparison, "left_out_log_probabilities", None)
    body = await classify(http, "brown", **source, method=first["method"], target_accuracy=0.85)
    assert (body["label"], body["temperature"]) == (None, first["temperature"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"target_accuracy": 0.9, "target_coverage": 0.9}, "target_coverage"),
        ({"target_accuracy": 0.0}, "target_accuracy"),
        ({"target_accuracy": 1.0}, "target_accuracy"),
        ({"target_coverage": 1.0}, "target_coverage"),
        ({"target_coverage": "0.5"}, "target_coverage"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": 1001}, "temperature"),
    ],
)
async def test_a_wrong_value_is_refused_by_name(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    status, named, _ = await refusal(http, **fields)
    assert (status, named) == (400, param)


@pytest.mark.parametrize("target", ["target_accuracy", "target_coverage"])
async def test_a_threshold_that_cannot_be_fitted_is_refused_with_what_it_needs(
    http: httpx.AsyncClient, client: FakeClient, target: str
) -> None:
    status, param, message = await refusal(http, shots=SHOTS[:6], **{target: 0.9})
    assert (status, param) == (422, target)
    assert message == f"{target} needs two examples of each candidate, so that one can be left out"
    for method in ("in_context", "blend"):
        status, param, message = await refusal(http, method=method, **{target: 0.9})
        assert (status, param) == (422, target)
        assert message.startswith(f"{target} needs an evaluation for the method {method}")
    assert client.scores == []


async def test_too_many_examples_for_leave_one_out_are_refused(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {**METHODS, "linear": replace(METHODS["linear"], max_left_out=9)}
    monkeypatch.setattr(comparison, "METHODS", few)
    assert (await classify(http, "orange", method="linear"))["temperature"] == DEFAULT_TEMPERATURES["linear"]
    status, param, message = await refusal(http, method="linear", target_accuracy=0.9)
    assert (status, param) == (422, "target_accuracy")
    assert "linear leaves out one of up to" in message


async def test_a_target_needs_the_temperature_that_was_fitted(http: httpx.AsyncClient) -> None:
    fitted = (await classify(http, "orange"))["temperature"]
    assert (await classify(http, "orange", temperature=fitted, target_accuracy=0.8))["label"] == "cat"
    status, param, message = await refusal(http, temperature=fitted + 1, target_accuracy=0.8)
    assert (status, param) == (422, "temperature")
    assert str(fitted) in message


@pytest.mark.parametrize("query", ["orange", "brown"])
@pytest.mark.parametrize("target", [{}, {"target_accuracy": 0.9}, {"target_coverage": 0.5}, {"temperature": 4}])
async def test_a_choice_is_as_sure_as_a_classification(http: httpx.AsyncClient, query: str, target: Any) -> None:
    classified = await classify(http, query, **target)
    body = {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": data_url(png(query))}]}],
        "questions": [
            {"type": "choice", "instructions": "Which?", "choices": [{"value": "cat"}, {"value": "dog"}], "name": "a"}
        ],
        "shots": SHOTS,
        "method": "nearest_mean",
        **target,
    }
    response = await http.post("/v1/decisions", json=body)
    (answer,) = response.json()["answers"]
    if classified["label"] is None:
        assert answer == {"type": "refusal", "name": "a"}
    else:
        assert (answer["choice"], answer["confidence"]) == (
            classified["label"],
            pytest.approx(classified["confidence"]),
        )


async def test_a_target_is_refused_for_a_question_of_the_language_model(http: httpx.AsyncClient) -> None:
    body = {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": data_url(png("orange"))}]}],
        "questions": [{"type": "predicate", "instructions": "Is it red?"}],
        "target_accuracy": 0.9,
    }
    response = await http.post("/v1/decisions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (422, "target_accuracy")
