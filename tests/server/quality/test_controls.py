"""Evaluations with controls, and the learning curves of methods without a prompt."""

from __future__ import annotations

import re
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from model.likeness import unit
from server.api.services import Services
from server.app import create_app
from server.fewshot import comparison
from server.fewshot.methods import load_method
from server.fewshot.methods.likeness import LikenessMethod
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.wire import Score
from tests.server.evaluations import LABEL_OF, run_evaluation
from tests.server.fakes import TOKENIZER, FakeClient, served_model

pytestmark = pytest.mark.anyio


async def test_controls_take_away_the_images_or_the_labels(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    controls = ["text_only", "shuffled_labels"]
    fields: dict[str, Any] = {"k": [1, 4], "strategies": ["rices_image", "balanced"], "methods": ["in_context", "knn"]}
    evaluation = await run_evaluation(http, services, **fields, controls=controls)
    assert evaluation["status"] == "completed"
    cells = [cell for cell in evaluation["cells"] if cell["control"] is not None]
    assert [(c["control"], c["method"], c["strategy"], c["k"]) for c in cells] == [
        (control, "in_context", "balanced", 4) for control in controls
    ]
    assert cells[0]["cost"]["media"] == 0
    blind, shuffled = client.scores[-12:-6], client.scores[-6:]
    assert all(not request.prompt.media for request in blind)
    assert all(request.prompt.media for request in client.scores[:-12])
    for request in blind:
        assert Counter(answers_of(request)) == {"warm": 2, "cold": 2}
    assert any(answers_of(request) != labels_of(request) for request in shuffled)
    assert all(sorted(answers_of(request)) == sorted(labels_of(request)) for request in shuffled)
    assert all(answers_of(request) == labels_of(request) for request in client.scores[:-12])
    assert [row["control"] for row in evaluation["summary"]][-2:] == ["shuffled_labels", "text_only"]
    assert evaluation["note"].count(", otherwise of ") == 2


async def test_a_control_without_shots_is_compared_with_its_setting(
    http: httpx.AsyncClient, services: Services
) -> None:
    fields: dict[str, Any] = {"k": [0], "methods": ["in_context"], "controls": ["text_only"]}
    evaluation = await run_evaluation(http, services, **fields)
    assert [cell["strategy"] for cell in evaluation["cells"]] == ["first", "first"]
    assert " without images, otherwise of " in evaluation["note"]


def answers_of(request: Score) -> list[str]:
    """Return the answers of the shots in a prompt."""
    text = TOKENIZER.decode(request.prompt.token_ids)
    return re.findall("warm|cold", text)


def labels_of(request: Score) -> list[str]:
    """Return the right answers of the shots in a prompt."""
    return [LABEL_OF[digest] for digest in request.prompt.media[:-1]]


class TestEncoderFeatures:
    """The features of the encoder do not tell the labels; the model's likeness does."""

    @pytest.fixture
    def app(self, client: FakeClient, settings: Settings) -> FastAPI:
        model = replace(served_model(), likeness=lambda features: unit(features[:, 2:]))
        return create_app(client, model, settings, Metrics("tiny"))

    async def test_they_are_compared_in_place_of_the_likeness(
        self, http: httpx.AsyncClient, client: FakeClient, services: Services
    ) -> None:
        rng = np.random.default_rng(0)
        client.vectors = {
            digest: np.array([*rng.normal(size=2) * 9, label == "warm", label == "cold"], np.float32)
            for digest, label in LABEL_OF.items()
        }
        fields: dict[str, Any] = {"methods": ["knn", "nearest_mean"], "controls": ["encoder_features"]}
        evaluation = await run_evaluation(http, services, **fields)
        rows = {(row["method"], row["control"]): row["accuracy"] for row in evaluation["summary"]}
        features = rows.pop(("nearest_mean", "encoder_features"))
        assert features < 1
        assert rows == {("knn", None): 1.0, ("nearest_mean", None): 1.0}
        control = next(cell for cell in evaluation["cells"] if cell["control"] is not None)
        assert (control["method"], control["k"]) == ("nearest_mean", None)
        assert "learning_curve" not in control
        assert f"{features:.3f} on the features of the encoder, otherwise of 1.000" in evaluation["note"]

    async def test_the_method_that_they_change_must_be_evaluated(
        self, http: httpx.AsyncClient, services: Services
    ) -> None:
        fields: dict[str, Any] = {"methods": ["knn"], "controls": ["encoder_features"]}
        response = await http.post("/v1/support_sets/colours/evaluate", json=fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "controls")
        assert "nearest_mean, which is not evaluated" in response.json()["error"]["message"]


async def test_a_model_that_compares_features_has_no_likeness_to_take_away(
    http: httpx.AsyncClient, services: Services
) -> None:
    response = await http.post("/v1/support_sets/colours/evaluate", json={"controls": ["encoder_features"]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "controls")
    assert "compares the features of this model's encoder already" in response.json()["error"]["message"]


async def test_methods_without_a_prompt_have_a_learning_curve(
    http: httpx.AsyncClient, client: FakeClient, services: Services
) -> None:
    by_label = np.eye(2, dtype=np.float32) + 0.1
    client.vectors = {digest: by_label[int(label == "warm")] for digest, label in LABEL_OF.items()}
    evaluation = await run_evaluation(http, services, methods=["knn", "nearest_mean"])
    curve = evaluation["learning_curve"]
    assert curve["method"] == evaluation["recommendation"]["request"]["method"]
    assert [(point["examples_per_label"], point["accuracy"]) for point in curve["points"]] == [(1, 1.0), (2, 1.0)]
    assert "from 1 to 2 examples per label" in curve["outlook"]
    in_context = await run_evaluation(http, services, k=[1], methods=["in_context"])
    assert in_context["learning_curve"] is None


async def test_an_evaluation_loads_its_methods_in_a_thread(
    http: httpx.AsyncClient, client: FakeClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the event loop, the import of scikit-learn would hold all requests for a second."""
    client.vectors = {digest: np.eye(2, dtype=np.float32)[int(label == "warm")] for digest, label in LABEL_OF.items()}
    loaders: set[threading.Thread] = set()

    def load(name: str) -> LikenessMethod:
        loaders.add(threading.current_thread())
        return load_method(name)

    monkeypatch.setattr(comparison, "load_method", load)
    await run_evaluation(http, services, methods=["linear", "knn"])
    assert loaders
    assert threading.main_thread() not in loaders
