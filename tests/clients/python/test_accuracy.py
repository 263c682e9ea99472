"""Tests of accuracy on labelled queries: of both clients with a fake server, and against scipy."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from flamboyance_client import AsyncClient, Client, Comparison, QueriesFailed, Recommendation, Selection
from flamboyance_client.accuracy import wilson_interval

Measure = Callable[..., Any]
# what the fake server answers, by method and content of the query's image
LABELS: dict[str, dict[str, str | None]] = {
    "knn": {"a1": "a", "a2": "b", "b1": "b", "b2": "b"},
    "auto": {"a1": "a", "a2": "a", "b1": None, "b2": "a"},
}
PAIRS = [(b"a1", "a"), (b"a2", "a"), (b"b1", "b"), (b"b2", "b")]


def answer(request: httpx.Request) -> httpx.Response:
    if request.url.path.endswith("/examples"):
        data = [{"id": "1", "label": "a"}, {"id": "2", "text": "b"}, {"id": "3"}]
        return httpx.Response(200, json={"data": data, "has_more": False})
    if request.method == "GET":
        counts = {"a": 1} if request.url.path.endswith("texts") else {"a": 2, "b": 1}
        fields = {"id": "ss_1", "version": 1, "num_examples": 3, "label_counts": counts}
        return httpx.Response(200, json=fields)
    body = json.loads(request.content)
    content = base64.b64decode(body["query"]["image"].partition(",")[2]).decode()
    if content not in LABELS[body["method"]]:
        error = {"message": "no", "code": "invalid_media", "param": "query.image"}
        return httpx.Response(400, json={"error": error})
    label = LABELS[body["method"]][content]
    used = "nearest_mean" if body["method"] == "auto" else body["method"]
    answered: dict[str, Any] = {"label": label, "confidence": 0.5, "candidates": [], "method": used, "threshold": 0.5}
    return httpx.Response(200, json=answered)


@pytest.fixture(params=["sync", "async"])
def measure(request: pytest.FixtureRequest) -> Measure:
    """The method `measure` of a client of the fake server."""
    if request.param == "sync":
        client = Client("http://server", transport=httpx.MockTransport(answer))
        return client.measure

    async def threaded(request: httpx.Request) -> httpx.Response:
        return await asyncio.to_thread(answer, request)

    def run(*arguments: Any, **options: Any) -> Any:
        async def measured() -> Any:
            async with AsyncClient("http://server", transport=httpx.MockTransport(threaded)) as client:
                return await client.measure(*arguments, **options)

        return asyncio.run(measured())

    return run


def test_each_method_is_measured_on_the_same_queries(measure: Measure) -> None:
    knn, auto = measure(PAIRS, methods=["knn", "auto"], examples="letters")
    assert (knn.method, knn.used, knn.queries, knn.labelled, knn.correct) == ("knn", "knn", 4, 4, 3)
    assert (knn.accuracy, knn.coverage, knn.mistakes) == (0.75, 1.0, {("a", "b"): 1})
    assert knn.accuracy_interval == wilson_interval(3, 4)
    # a query without a label is neither correct nor a mistake
    assert (auto.method, auto.used, auto.labelled, auto.correct) == ("auto", "nearest_mean", 3, 2)
    assert (auto.accuracy, auto.coverage, auto.mistakes) == (2 / 3, 0.75, {("b", "a"): 1})
    # of the queries that both have labelled
    assert knn.compare(auto) == Comparison(only_first=1, only_second=1)
    assert knn.compare(knn) == Comparison(only_first=0, only_second=0)
    assert {knn, auto} == {auto, knn}


def test_labels_of_a_folder_are_the_names_of_its_subfolders(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gif = "GIF89a"
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.gif").write_bytes(f"{gif}{label}".encode())
    monkeypatch.setitem(LABELS["knn"], f"{gif}a", "a")
    monkeypatch.setitem(LABELS["knn"], f"{gif}b", "a")
    (knn,) = measure(tmp_path, methods=["knn"])
    assert (knn.outcomes, knn.mistakes) == ((True, False), {("b", "a"): 1})


def test_a_label_that_no_answer_can_have_is_refused(measure: Measure) -> None:
    refusal = "^no answer can have the labels c; the possible ones are a, b$"
    for options in (
        {"examples": "letters"},
        {"examples": "letters", "candidates": ["a", {"label": "b", "text": "c"}]},
        {"shots": [{"image": b"a", "label": "a", "text": "c"}, {"image": b"b", "text": "b"}]},
        {"shots": [{"image": b"a", "answer": "a"}, {"image": b"b", "label": "b"}]},
        {"examples": "texts"},
    ):
        with pytest.raises(ValueError, match=refusal):
            measure([*PAIRS, (b"a1", "c")], methods=["knn"], **options)
        assert measure(PAIRS, methods=["knn"], **options)[0].correct == 3
    with pytest.raises(ValueError, match=r"the label of queries\[1\]: expected a text or a whole number, got 1.0"):
        measure([(b"a1", "a"), (b"a2", 1.0)], methods=["knn"])


def test_labels_are_compared_in_one_unicode_form(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    composed, decomposed = "\u00e9", "e\u0301"
    monkeypatch.setitem(LABELS["knn"], "a1", composed)
    monkeypatch.setitem(LABELS["knn"], "a2", decomposed)
    pairs = [(b"a1", composed), (b"a1", decomposed), (b"a2", composed), (b"a2", decomposed), (b"b1", composed)]
    (knn,) = measure(pairs, methods=["knn"], candidates=[composed, "b"])
    assert (knn.correct, knn.mistakes) == (4, {(composed, "b"): 1})


def test_unknown_labels_that_look_like_possible_ones_have_escapes(measure: Measure) -> None:
    pairs = [(b"a1", "\u00e9 "), (b"a2", "c")]
    with pytest.raises(ValueError, match=r"labels c, '\\xe9 '; the possible ones are '\\xe9', b$"):
        measure(pairs, methods=["knn"], candidates=["\u00e9", "b"])


def test_labels_may_be_whole_numbers(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LABELS["knn"], "a1", "1")
    (knn,) = measure([(b"a1", np.int64(1))], methods=["knn"])
    assert knn.accuracy == 1.0


def test_a_query_that_fails_is_an_error(measure: Measure) -> None:
    with pytest.raises(QueriesFailed, match="1 of 2 queries failed"):
        measure([(b"a1", "a"), (b"broken", "a")], methods=["knn"])
    with pytest.raises(ValueError, match="there are no queries"):
        measure([], methods=["knn"])


def test_a_query_that_fails_loses_no_finished_method(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LABELS["knn"], "a3", "a")
    pairs = [*PAIRS, (b"a3", "a")]
    with pytest.raises(QueriesFailed, match="1 of 5 queries failed") as caught:
        measure(pairs, methods=["knn", "auto"])
    assert caught.value.accuracies == measure(pairs, methods=["knn"])
    with pytest.raises(QueriesFailed, match="1 of 5 queries failed") as caught:
        measure(pairs, methods=["auto", "knn"])
    assert caught.value.accuracies == ()


def test_without_methods_the_options_have_the_method(measure: Measure) -> None:
    examples: Selection = {"support_set": "letters"}
    request = {"examples": examples, "method": "knn"}
    recommendation = Recommendation(request=request, accuracy=0.9, accuracy_interval=(0.8, 1.0))
    valid: list[dict[str, Any]] = [{"method": "knn"}, {"examples": recommendation}]
    for options in valid:
        (knn,) = measure(PAIRS, **options)
        assert (knn.method, knn.used, knn.correct) == ("knn", "knn", 3)
    refused: list[dict[str, Any]] = [{"methods": ["knn"], "method": "auto"}, {"methods": "knn"}, {"on_error": "return"}]
    for options in refused:
        with pytest.raises(TypeError):
            measure(PAIRS, **options)


@pytest.mark.parametrize("options", [{}, {"methods": ["knn"]}, {"methods": ["auto", "knn"]}])
def test_the_candidates_of_a_recommendation_may_be_other_labels(measure: Measure, options: dict[str, Any]) -> None:
    request = {"examples": {"support_set": "letters"}, "method": "knn", "candidates": ["a", "c"]}
    recommendation = Recommendation(request=request, accuracy=0.9, accuracy_interval=(0.8, 1.0))
    *_, knn = measure([(b"a1", "a"), (b"a2", "c")], examples=recommendation, **options)
    assert knn.correct == 1


def test_nothing_labelled_has_no_accuracy(measure: Measure) -> None:
    (auto,) = measure([(b"b1", "b")], method="auto")
    assert (auto.accuracy, auto.accuracy_interval, auto.coverage) == (None, None, 0.0)


@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_intervals_are_those_of_scipy(numbers: tuple[int, int]) -> None:
    expected = binomtest(*numbers).proportion_ci(method="wilson")
    assert wilson_interval(*numbers) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (wilson_interval(numbers[1], numbers[1])[1], wilson_interval(0, numbers[1])[0]) == (1.0, 0.0)


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_p_value_is_that_of_scipy(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert Comparison(only_first=first, only_second=second).p_value == pytest.approx(expected, abs=1e-12)
