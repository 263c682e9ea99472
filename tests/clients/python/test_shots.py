"""Tests that shots and stored examples take the media of a query, and `examples` what names a support set."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flamboyance_client import Client, Evaluation, Recommendation, SupportSet, query
from flamboyance_client.api import Api, Call
from flamboyance_client.options import ClassifyOptions, FewShotOptions, Method
from flamboyance_client.stored import SupportSetCalls

DATA = b"\x89PNG\r\n\x1a\n and more"
URL = f"data:image/png;base64,{base64.b64encode(DATA).decode()}"
VIDEO = b"\x00\x00\x00\x18ftypmp42"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(DATA)
    return tmp_path / "a.png"


def bodies(examples: Any) -> list[list[dict[str, Any]]]:
    """Return the examples as each call that has some sends them."""
    calls: list[Call[Any]] = [
        Api().classify(DATA, {"shots": examples}),
        Api().fewshot(DATA, {"shots": examples}),
        SupportSetCalls().create({"name": "pets", "examples": examples}),
        SupportSetCalls().put("pets", examples, None),
    ]
    sent = [call.body or {} for call in calls]
    return [body["shots"] if "shots" in body else body["examples"] for body in sent]


def test_an_image_is_a_path_bytes_a_url_or_an_id(file: Path) -> None:
    for source in (file, str(file), DATA, bytearray(DATA), memoryview(DATA), URL):
        shots = [{"image": source, "label": "x"}]
        assert bodies(shots) == [[{"image": URL, "label": "x"}]] * 4
        assert shots == [{"image": source, "label": "x"}]
    for source in ("https://host/a.png", "img_1", "vid_1"):
        assert bodies([{"image": source, "answer": "y"}]) == [[{"image": source, "answer": "y"}]] * 4


def test_a_file_whose_name_begins_like_an_id_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("img_0001.png", "vid_1.png"):
        Path(name).write_bytes(DATA)
        assert bodies([{"image": name, "label": "x"}]) == [[{"image": URL, "label": "x"}]] * 4


def test_an_image_is_a_picture_or_an_array() -> None:
    picture = Image.new("RGB", (3, 2), "red")
    for source in (picture, np.asarray(picture)):
        (sent,) = Api().classify(DATA, {"shots": [{"image": source, "label": "x"}]}).body["shots"]  # type: ignore[index]
        assert sent["image"].startswith("data:image/png;base64,")


def test_a_video_becomes_a_part() -> None:
    ((sent,), *_) = bodies([{"image": VIDEO, "label": "x"}])
    assert sent.keys() == {"label", "media"}
    assert sent["media"][0]["type"] == "video_url"


def test_a_query_as_a_dictionary_takes_the_same(file: Path) -> None:
    for source in ({"image": file}, query(file), file):
        body = Api().classify(source, {}).body or {}  # type: ignore[arg-type]
        assert body["query"] == {"image": URL}


def test_a_shot_without_an_image_is_sent_as_it_is() -> None:
    shots = [{"text": "a"}, {"media": [{"type": "image_id", "image_id": "img_1"}], "label": "b"}]
    assert bodies(shots) == [shots] * 4


def test_examples_name_a_set() -> None:
    recommendation = Recommendation(
        request={"examples": {"support_set": "ss_1", "version": 2}}, accuracy=1, accuracy_interval=(0, 1)
    )
    for source, sent in (
        ("pets", {"support_set": "pets"}),
        (SupportSet(id="ss_1", version=2, name="pets"), {"support_set": "ss_1", "version": 2}),
        (recommendation, {"support_set": "ss_1", "version": 2}),
        ({"support_set": "pets", "k": 2}, {"support_set": "pets", "k": 2}),
    ):
        for call in (Api().classify(DATA, {"examples": source}), Api().fewshot(DATA, {"examples": source})):  # type: ignore[typeddict-item]
            assert (call.body or {})["examples"] == sent


def test_a_recommendation_repeats_the_fields_of_its_evaluation() -> None:
    repeated = {"model": "other", "template": "vqa", "candidates": ["cat"], "calibration": "contextual"}
    request = {"examples": {"support_set": "ss_1"}, "method": "in_context", **repeated}
    recommendation = Recommendation.parse({"request": request, "accuracy": 1.0, "accuracy_interval": [0.0, 1.0]})
    sent = Api().classify(DATA, {"examples": recommendation}).body or {}
    assert {name: sent[name] for name in (*repeated, "method")} == {**repeated, "method": "in_context"}
    other = Api().classify(DATA, {"examples": recommendation, "method": "knn"}).body or {}
    assert {name: other.get(name) for name in repeated} == {**repeated, "calibration": None}
    overridden = Api().classify(DATA, {"examples": recommendation, "method": "knn", "candidates": ["dog"]}).body or {}
    assert overridden["candidates"] == ["dog"]


@pytest.mark.parametrize(("method", "is_prompted"), [("knn", False), ("blend", True), (None, True)])
def test_another_method_selects_shots_only_if_it_has_a_prompt(method: Method | None, is_prompted: bool) -> None:
    """The server refuses a selection of shots for a method that compares the query with all examples."""
    examples = {"support_set": "ss_1", "version": 3, "k": 4, "strategy": "balanced"}
    request = {"examples": examples, "method": "in_context"}
    recommendation = Recommendation(request=request, accuracy=1.0, accuracy_interval=(0.0, 1.0))
    options: ClassifyOptions = {"examples": recommendation}
    if method is not None:
        options["method"] = method
    sent = Api().classify(DATA, options).body or {}
    assert sent["examples"] == (examples if is_prompted else {"support_set": "ss_1", "version": 3})


def test_a_completion_has_the_form_and_the_template_of_a_recommendation() -> None:
    repeated: Any = {"template": "vqa", "candidates": ["cat"], "calibration": "contextual", "seed": 3}
    examples = {"support_set": "ss_1"}
    request = {"examples": examples, "method": "in_context", "shots_attend": "alone", "temperature": 2.5, **repeated}
    recommendation = Recommendation(request=request, accuracy=1.0, accuracy_interval=(0.0, 1.0))
    for stream in (False, True):
        sent = Api().fewshot(b"GIF89a", {"examples": recommendation}, stream=stream).body or {}
        fields = {name: value for name, value in sent.items() if name not in ("query", "stream", "stream_options")}
        assert fields == {"examples": examples, "shots_attend": "alone", "template": "vqa"}
    overrides: FewShotOptions = {"template": "caption", "shots_attend": "previous", "temperature": 0.0}
    sent = Api().fewshot(b"GIF89a", {**overrides, "examples": recommendation}).body or {}
    assert {name: sent[name] for name in overrides} == overrides


def test_what_are_no_examples_is_refused_before_it_is_sent() -> None:
    evaluation = Evaluation(id="eval_1", status="completed")
    with Client("http://nowhere") as client:
        for send in (client.classify, client.fewshot.complete):
            with pytest.raises(ValueError, match="pass a support set; the recommendation of an evaluation that"):
                send(DATA, examples=evaluation.recommendation)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"must be evaluation\.recommendation"):
                send(DATA, examples=evaluation)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="examples is None"):
            client.classify_many([DATA], examples=None)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="examples is None"):
            client.measure([(DATA, "a")], examples=None)  # type: ignore[arg-type]


def test_several_queries_are_no_media_of_one(file: Path) -> None:
    with Client("http://nowhere") as client:
        for queries in ([file, file], [str(file)], [query(file)]):
            with pytest.raises(TypeError, match=r"must be parts, such as image.*classify_many"):
                client.classify(queries, examples="pets")  # type: ignore[arg-type]


def test_a_recommendation_sets_the_method_and_its_temperature() -> None:
    request = {"examples": {"support_set": "ss_1"}, "method": "blend"}
    values = {"accuracy": 1.0, "accuracy_interval": [0, 1]}
    warm, plain = (
        Recommendation.parse({**values, "request": fields}) for fields in ({**request, "temperature": 2.5}, request)
    )
    sent = [Api().classify(DATA, {"examples": recommended}).body or {} for recommended in (warm, plain)]
    assert [(body["method"], body.get("temperature")) for body in sent] == [("blend", 2.5), ("blend", None)]
    hot = Api().classify(DATA, {"examples": warm, "temperature": 4.0}).body or {}
    assert (hot["method"], hot["temperature"]) == ("blend", 4.0)
    other = Api().classify(DATA, {"examples": warm, "method": "knn"}).body or {}
    assert (other["method"], "temperature" in other) == ("knn", False)


def test_a_missing_file_is_named() -> None:
    with Client() as client, pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        client.classify(DATA, shots=[{"image": "nowhere.png", "label": "x"}])
