"""POST /v1/classify: probabilities of the candidates, and the requests to the engine."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest

from server.errors import EngineFailed
from server.fewshot.classification import GREY_MEDIA
from server.media.source import encoded
from server.wire import Score
from tests.server.conftest import data_url, png
from tests.server.fakes import TOKENIZER, FakeClient

pytestmark = pytest.mark.anyio

RED, GREEN, BLUE = (png(colour) for colour in ("red", "green", "blue"))
SHOTS = [{"image": data_url(RED), "label": "cat"}, {"image": data_url(GREEN), "label": "dog"}]
QUERY = {"image": data_url(BLUE)}


def source(data: bytes) -> bytes:
    return encoded(data, "image", "").digest


def label_logprobs(**labels: float) -> Any:
    """Return log-probabilities by the text of a candidate, all of it on the first token."""

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        total = labels[TOKENIZER.decode(candidate).strip()]
        return [total] + [0.0] * (len(candidate) - 1)

    return logprobs


async def classify(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"shots": SHOTS, "query": QUERY, "method": "in_context", **fields}
    answer = await http.post("/v1/classify", json=body)
    assert answer.status_code == 200, answer.text
    classification: dict[str, Any] = answer.json()
    return classification


async def refused(http: httpx.AsyncClient, **fields: Any) -> tuple[int, str | None]:
    answer = await http.post("/v1/classify", json={"shots": SHOTS, "query": QUERY, **fields})
    return answer.status_code, answer.json()["error"]["param"]


async def test_candidates_are_ranked_by_probability(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.logprobs = label_logprobs(cat=math.log(0.1), dog=math.log(0.3))
    body = await classify(http)
    assert (body["object"], body["model"], body["label"]) == ("classification", "tiny", "dog")
    assert body["confidence"] == pytest.approx(0.75)
    assert [candidate["label"] for candidate in body["candidates"]] == ["dog", "cat"]
    assert body["candidates"][1] == {
        "label": "cat",
        "text": "cat",
        "logprob": pytest.approx(math.log(0.1)),
        "num_tokens": 3,
        "probability": pytest.approx(0.25),
        "scores": {"in_context": pytest.approx(math.log(0.25))},
    }


async def test_candidates_follow_the_prompt_of_the_template(http: httpx.AsyncClient, client: FakeClient) -> None:
    await classify(http)
    (request,) = client.scores
    text = TOKENIZER.decode(request.prompt.token_ids, skip_special_tokens=False)
    assert text == "<image>Output:cat<|endofchunk|><image>Output:dog<|endofchunk|><image>Output:"
    assert request.prompt.media == [source(RED), source(GREEN), source(BLUE)]
    assert [TOKENIZER.decode(ids) for ids in request.candidates] == ["cat", "dog"]


async def test_candidates_begin_with_the_space_of_a_custom_template(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    await classify(http, template={"shot": "{media}It is {label}"})
    (request,) = client.scores
    assert [TOKENIZER.decode(ids) for ids in request.candidates] == [" cat", " dog"]
    assert TOKENIZER.decode(request.prompt.token_ids).endswith("It is")


async def test_a_label_may_have_a_different_text(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.logprobs = label_logprobs(Katze=-1.0, dog=-2.0)
    body = await classify(http, candidates=[{"label": "cat", "text": "Katze"}, "dog"])
    assert body["label"] == "cat"
    assert body["candidates"][0]["text"] == "Katze"
    longest = "c" * 1024  # as in a stored example
    body = await classify(http, candidates=[{"label": longest, "text": "Katze"}, "dog"])
    assert body["label"] == longest


async def test_length_affects_sums_but_not_means(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.logprobs = lambda request, candidate: [-1.0 / len(candidate) ** 0.5] * len(candidate)
    long, short = "a long name", "a"
    by_sum = await classify(http, candidates=[long, short], normalisation="sum")
    by_mean = await classify(http, candidates=[long, short], normalisation="mean")
    assert (by_sum["label"], by_mean["label"]) == (short, long)
    assert by_mean["candidates"][0]["logprob"] == pytest.approx(-(len(long) ** 0.5))


async def test_calibration_removes_the_bias_for_a_label(http: httpx.AsyncClient, client: FakeClient) -> None:
    """The engine favours "cat" by a factor of five, also for a grey image."""
    truth = {"cat": 0.4, "dog": 0.6}

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        label = TOKENIZER.decode(candidate)
        share = truth[label] if request.prompt.media[-1] == source(BLUE) else 0.5
        return [math.log(share * (5 if label == "cat" else 1))] + [0.0] * (len(candidate) - 1)

    client.logprobs = logprobs
    biased = await classify(http)
    assert (biased["label"], biased["confidence"]) == ("cat", pytest.approx(2.0 / 2.6))
    calibrated = await classify(http, calibration="contextual")
    assert (calibrated["label"], calibrated["confidence"]) == ("dog", pytest.approx(0.6))
    assert calibrated["usage"]["fewshot_details"]["prompts"] == 2


async def test_content_free_queries_have_no_text_and_a_grey_image_or_none(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    query = {**QUERY, "question": "which?"}
    template = {"shot": "{media}{question} {label}"}
    shots = [{**shot, "question": "which?"} for shot in SHOTS]
    await classify(http, shots=shots, query=query, template=template, calibration="contextual", content_free="both")
    texts = [TOKENIZER.decode(request.prompt.token_ids, skip_special_tokens=False) for request in client.scores]
    before = "<image>which? cat<|endofchunk|><image>which? dog<|endofchunk|>"
    assert texts == [f"{before}<image>which?", f"{before}<image>N/A", f"{before}N/A"]
    assert [request.prompt.media[-1] for request in client.scores] == [source(BLUE), GREY_MEDIA.digest, source(GREEN)]
    assert all(
        set(request.prompt.media) == set(media) for request, media in zip(client.scores, client.media, strict=True)
    )
    assert len({str(request.candidates) for request in client.scores}) == 1


async def test_each_order_of_the_shots_has_its_own_bias(http: httpx.AsyncClient, client: FakeClient) -> None:
    """The last shot's label is three times as likely, also for a grey image."""

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        label, last = TOKENIZER.decode(candidate), {source(RED): "cat", source(GREEN): "dog"}[request.prompt.media[-2]]
        share = {"cat": 0.2, "dog": 0.3}[label] if request.prompt.media[-1] == source(BLUE) else 0.25
        return [math.log(share * (3 if label == last else 1))] + [0.0] * (len(candidate) - 1)

    client.logprobs = logprobs
    calibrated = await classify(http, permutations=2, calibration="contextual")
    assert (calibrated["label"], calibrated["confidence"]) == ("dog", pytest.approx(0.6))


async def test_permutations_are_averaged(http: httpx.AsyncClient, client: FakeClient) -> None:
    """With a recency bias, the last shot's label is three times as likely."""

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        last = {source(RED): "cat", source(GREEN): "dog"}[request.prompt.media[-2]]
        return [math.log(3 if TOKENIZER.decode(candidate) == last else 1)] + [0.0] * (len(candidate) - 1)

    client.logprobs = logprobs
    assert (await classify(http))["confidence"] == pytest.approx(0.75)
    body = await classify(http, permutations=6)
    assert body["confidence"] == pytest.approx(0.5)
    assert body["fewshot"]["permutations"] == 2  # two shots have only two orders
    assert body["candidates"][0]["logprob"] == pytest.approx(math.log(3) / 2)


async def test_the_response_reports_shots_settings_and_usage(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await classify(http, calibration="contextual", permutations=2)
    assert [shot["label"] for shot in body["fewshot"]["shots"]] == ["cat", "dog"]
    assert {name: body["fewshot"][name] for name in ("template", "normalisation", "calibration")} == {
        "template": "classification",
        "normalisation": "sum",
        "calibration": "contextual",
    }
    length = len(client.scores[0].prompt.token_ids)
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == 4 * length
    assert body["usage"]["completion_tokens"] == 0
    details = body["usage"]["fewshot_details"]
    assert (details["prompts"], details["candidate_tokens"], details["media"]) == (4, 4 * 6, 12)


async def test_top_k_limits_the_response_but_not_the_weighing(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.logprobs = label_logprobs(cat=0.0, dog=0.0, cow=0.0)
    body = await classify(http, candidates=["cat", "dog", "cow"], top_k=1)
    assert [candidate["label"] for candidate in body["candidates"]] == ["cat"]
    assert body["confidence"] == pytest.approx(1 / 3)


async def test_each_distinct_label_of_a_support_set_is_a_candidate(http: httpx.AsyncClient, client: FakeClient) -> None:
    red = data_url(RED)
    examples = [{"image": red, "label": "dog"}, {"image": red}, {"image": red, "text": "cat"}, {"text": "dog"}]
    assert (await http.post("/v1/support_sets", json={"name": "pets", "examples": examples})).status_code == 200
    await classify(http, shots=[], examples={"support_set": "pets", "k": 1})
    assert [TOKENIZER.decode(ids) for ids in client.scores[0].candidates] == ["dog", "cat"]


async def test_ids_and_priority_reach_the_engine(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await classify(http, request_id="mine", priority=7, permutations=2)
    assert body["id"] == "classify-mine"
    assert [request.priority for request in client.scores] == [7, 7]
    assert len({request.request_id for request in client.scores}) == 2


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"candidates": ["cat", "cat"]}, 400, "candidates[1]"),
        ({"candidates": ["cat", {"label": "cat", "text": "Katze"}]}, 400, "candidates[1]"),
        ({"candidates": [{"label": "a", "text": "cat"}, {"label": "b", "text": "cat"}]}, 400, "candidates[1]"),
        ({"candidates": ["cat", ""]}, 400, "candidates[1]"),
        ({"candidates": ["cat", {"label": "dog"}]}, 400, "candidates[1].text"),
        ({"candidates": ["cat", {"label": "d" * 1025, "text": "dog"}]}, 400, "candidates[1].label"),
        ({"candidates": ["cat", "x" * 64]}, 400, "candidates[1]"),
        ({"shots": []}, 400, "candidates"),
        ({"permutations": 25}, 400, "permutations"),
        ({"permutations": 0}, 400, "permutations"),
        ({"normalisation": "median"}, 422, "normalisation"),
        ({"calibration": "platt"}, 422, "calibration"),
        ({"content_free": "black"}, 422, "content_free"),
        ({"top_k": 0}, 400, "top_k"),
        ({"template": "poem"}, 400, "template"),
        ({"max_tokens": 5}, 422, "max_tokens"),
        ({"model": "other"}, 404, "model"),
    ],
)
async def test_an_error_names_the_invalid_field(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str | None
) -> None:
    assert await refused(http, **fields) == (status, param)


async def test_an_engine_failure_fails_only_its_request(http: httpx.AsyncClient, client: FakeClient) -> None:
    def fail(request: Score, candidate: list[int]) -> list[float]:
        raise EngineFailed("gave up")

    client.logprobs = fail
    answer = await http.post("/v1/classify", json={"shots": SHOTS, "query": QUERY, "permutations": 2})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")
    client.logprobs = label_logprobs(cat=-1.0, dog=-2.0)
    assert (await classify(http))["label"] == "cat"
