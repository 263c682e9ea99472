"""POST /v1/fewshot/completions and the search of a support set, as a client sees them; the engine tells a story."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from model.prompt import EndOfChunk, Media, Segment, Text, encode
from server.app import create_app
from server.fewshot.examples import NewExample, SupportSetInfo
from server.fewshot.support_sets import SupportSets
from server.media.source import EncodedMedia, encoded
from server.metrics import Metrics
from server.served_model import ServedModel
from server.settings import Settings
from tests.server.conftest import data_url, image_part, picture
from tests.server.fakes import CONFIG, TOKENIZER, FakeClient, unit_vector
from tests.tiny_models import CONFIGS

pytestmark = pytest.mark.anyio

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
PICTURES = [encoded(picture(colour), "image", "") for colour in COLOURS]
QUERY = encoded(picture("purple"), "image", "")
END, LINE = EndOfChunk(), Text("\n")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_media_per_request=5, keep_alive=0.05)


@pytest.fixture
def app(client: FakeClient, settings: Settings) -> FastAPI:
    return create_app(client, ServedModel("tiny", CONFIG, TOKENIZER, max_model_len=128), settings, Metrics("tiny"))


@pytest.fixture
def support_sets(app: FastAPI) -> SupportSets:
    found: SupportSets = app.state.services.support_sets
    return found


def example(place: int, **fields: Any) -> NewExample:
    given = {"text": f"a {COLOURS[place]} one", "label": "warm" if place in (0, 5) else "cold", **fields}
    return NewExample(id=f"e{place}", media=given.pop("media", (PICTURES[place],)), **given)


@pytest.fixture
async def colours(support_sets: SupportSets) -> SupportSetInfo:
    return await support_sets.create("colours", [example(place) for place in range(6)])


def url(media: EncodedMedia) -> str:
    return data_url(media.data)


async def post(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/fewshot/completions", json={"query": {"image": url(QUERY)}, **fields})


async def complete(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await post(http, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def chosen(http: httpx.AsyncClient, query: dict[str, Any] | None = None, **examples: Any) -> list[str]:
    fields = {"query": query} if query else {}
    body = await complete(http, examples={"support_set": "colours", **examples}, **fields)
    return [shot["id"] for shot in body["fewshot"]["shots"]]


def token_ids(*segments: Segment) -> list[int]:
    return encode(segments, TOKENIZER).token_ids


def shot(media: EncodedMedia, answer: str) -> tuple[Segment, ...]:
    return (Media(media.digest), Text(f"Output:{answer}"), END, LINE)


def refusal(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


# shots in the request

SHOTS: list[dict[str, Any]] = [
    {"id": "one", "image": url(PICTURES[0]), "answer": "warm"},
    {"media": [image_part()], "label": "cold"},
]


async def test_an_answer_is_a_completion_that_tells_its_shots(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await complete(http, shots=SHOTS, request_id="mine", max_tokens=9)
    (request,) = client.requests
    expected: list[Segment] = [
        *shot(PICTURES[0], "warm"),
        *shot(PICTURES[0], "cold"),
        Media(QUERY.digest),
        Text("Output:"),
    ]
    assert request.token_ids == token_ids(*expected)
    assert request.media == [PICTURES[0].digest, PICTURES[0].digest, QUERY.digest]
    assert body["id"] == "cmpl-mine"
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "a cat", "logprobs": None, "finish_reason": "stop"}]
    assert body["fewshot"] == {
        "template": "caption",
        "strategy": None,
        "support_set": None,
        "version": None,
        "shots": [{"id": "one", "score": None, "label": None}, {"id": None, "score": None, "label": "cold"}],
        "shots_left_out": 0,
    }
    assert body["usage"]["fewshot_details"] == {
        "media": 3,
        "media_encoded": 1,
        "media_cached": 0,
        "media_deduplicated": 1,
        "shots_used": 2,
        "support_set": None,
        "version": None,
    }


async def test_the_prompt_is_that_of_a_completion_written_by_hand(http: httpx.AsyncClient, client: FakeClient) -> None:
    await complete(http, shots=SHOTS, seed=3)
    end, line = {"type": "end_of_chunk"}, {"type": "text", "text": "\n"}
    parts: list[Any] = []
    for given, answer in ((image_part(PICTURES[0].data), "warm"), (image_part(), "cold")):
        parts += [given, {"type": "text", "text": f"Output:{answer}"}, end, line]
    parts += [image_part(QUERY.data), {"type": "text", "text": "Output:"}]
    response = await http.post("/v1/completions", json={"prompt": parts, "seed": 3})
    assert response.status_code == 200
    ours, theirs = client.requests
    names = ("token_ids", "media_index", "media", "sampling")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


async def test_a_stream_tells_the_shots_once_with_its_first_chunk(http: httpx.AsyncClient) -> None:
    response = await post(http, shots=SHOTS, stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert ["fewshot" in chunk for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [one["id"] for one in chunks[0]["fewshot"]["shots"]] == ["one", None]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "a cat"
    assert chunks[-1]["usage"]["fewshot_details"]["shots_used"] == 2


async def test_an_echo_shows_the_prompt_with_its_markers(http: httpx.AsyncClient) -> None:
    body = await complete(http, shots=SHOTS[:1], echo=True, max_tokens=1)
    assert body["fewshot"]["prompt"] == "<image>Output:warm<|endofchunk|>\n<image>Output:"
    assert "prompt" not in (await complete(http, shots=SHOTS[:1]))["fewshot"]


async def test_zero_shot_shows_two_examples_without_their_pictures(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    body = await complete(http, examples={"support_set": "colours"}, zero_shot=True)
    texts: list[Segment] = [Text("Output:a red one"), END, Text("\nOutput:a green one"), END, LINE]
    assert client.requests[0].token_ids == token_ids(*texts, Media(QUERY.digest), Text("Output:"))
    assert client.requests[0].media == [QUERY.digest]
    assert [one["id"] for one in body["fewshot"]["shots"]] == ["e0", "e1"]


async def test_a_query_needs_no_shots(http: httpx.AsyncClient, client: FakeClient) -> None:
    assert (await complete(http))["fewshot"]["shots"] == []
    assert client.requests[0].token_ids == token_ids(Media(QUERY.digest), Text("Output:"))


# where an answer ends, and what it begins with

LINES: dict[str, Any] = {"shot": "{media}Output: {answer}", "end": "\n"}


async def test_an_answer_ends_with_its_template_unless_the_client_says_otherwise(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    client.answer = " a cat\nOutput: a dog"
    stops: list[tuple[dict[str, Any], str]] = [
        ({}, "a cat"),
        ({"stop": "at"}, "a c"),
        ({"stop": []}, "a cat\nOutput: a dog"),
    ]
    for fields, text in stops:
        body = await complete(http, shots=SHOTS, template=LINES, max_tokens=30, **fields)
        assert body["choices"][0]["text"] == text
    segments: list[Segment] = [
        Media(PICTURES[0].digest),
        Text("Output: warm\n"),
        Media(PICTURES[0].digest),
        Text("Output: cold\n"),
    ]
    assert client.requests[0].token_ids == token_ids(*segments, Media(QUERY.digest), Text("Output:"))


async def test_a_choice_begins_with_the_space_that_the_template_leads_with(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    for form in ({"choice": ["a cat", "a dog"]}, {"regex": "a (cat|dog)"}):
        await complete(http, shots=SHOTS, template=LINES, structured_outputs=form)
    choice, regex = (request.sampling.grammar for request in client.requests)
    assert choice is not None
    assert choice.choices == (" a cat", " a dog")
    assert regex is not None
    assert regex.text == r"\ (?:a (cat|dog))"


async def test_an_end_of_chunk_that_ends_no_sequence_ends_the_answer(client: FakeClient, settings: Settings) -> None:
    config = replace(CONFIG, prompt=replace(CONFIG.prompt, eos=("</s>",)))
    app = create_app(client, ServedModel("tiny", config, TOKENIZER, 128), settings, Metrics("tiny"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
        await complete(http, shots=SHOTS[:1], stop_token_ids=[7])
    await app.state.services.decoder.stop()
    assert client.requests[0].sampling.stop_token_ids == (7, TOKENIZER.id_of("<|endofchunk|>"))


# shots out of a support set


async def test_examples_are_written_as_shots_would_be(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    body = await complete(http, examples={"support_set": "colours", "k": 2}, template="classification")
    expected: list[Segment] = []
    for place, label in ((0, "warm"), (1, "cold")):
        expected += [Media(PICTURES[place].digest), Text(f"Output:{label}"), END]
    assert client.requests[0].token_ids == token_ids(*expected, Media(QUERY.digest), Text("Output:"))
    assert [media.data for media in client.media[0].values()] == [PICTURES[0].data, PICTURES[1].data, QUERY.data]
    assert body["fewshot"] | {"shots": []} == {
        "template": "classification",
        "strategy": "first",
        "support_set": colours.id,
        "version": 1,
        "shots": [],
        "shots_left_out": 0,
    }
    assert body["usage"]["fewshot_details"]["support_set"] == colours.id


async def test_a_version_stays_as_it_was(
    http: httpx.AsyncClient, colours: SupportSetInfo, support_sets: SupportSets
) -> None:
    await support_sets.remove_examples("colours", ["e0"])
    assert await chosen(http, k=2) == ["e1", "e2"]
    assert await chosen(http, k=2, version=1) == ["e0", "e1"]
    response = await post(http, examples={"support_set": "colours", "version": 7})
    assert refusal(response)[:2] == (404, "support_set_not_found")


async def test_the_default_is_four_or_what_there_is(http: httpx.AsyncClient, support_sets: SupportSets) -> None:
    await support_sets.create("colours", [example(place) for place in range(6)])
    await support_sets.create("few", [example(place) for place in range(3)])
    assert await chosen(http) == ["e0", "e1", "e2", "e3"]
    assert await chosen(http, support_set="few") == ["e0", "e1", "e2"]


@pytest.mark.parametrize("strategy", ["random", "balanced"])
async def test_a_seed_chooses_the_same_again(http: httpx.AsyncClient, colours: SupportSetInfo, strategy: str) -> None:
    seeds = [await chosen(http, strategy=strategy, seed=seed) for seed in range(8)]
    assert seeds == [await chosen(http, strategy=strategy, seed=seed) for seed in range(8)]
    assert len(set(map(tuple, seeds))) > 4
    assert all(len(set(ids)) == 4 for ids in seeds)


async def test_balanced_shows_each_label_as_often(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    for seed in range(5):
        body = await complete(http, examples={"support_set": "colours", "k": 4, "strategy": "balanced", "seed": seed})
        labels = [one["label"] for one in body["fewshot"]["shots"]]
        assert sorted(labels[:2]) == sorted(labels[2:]) == ["cold", "warm"]


# the most similar


def by_similarity(query: np.ndarray, vectors: Sequence[np.ndarray]) -> tuple[list[str], list[float]]:
    scores = [float(query.astype(np.float64) @ vector) for vector in vectors]
    places = sorted(range(len(scores)), key=lambda place: -scores[place])
    return [f"e{place}" for place in places], [scores[place] for place in places]


def media_vector(media: EncodedMedia) -> np.ndarray:
    return unit_vector(media.digest, CONFIG.vision.feature_dim)


def text_vector(text: str) -> np.ndarray:
    return unit_vector(repr(TOKENIZER.encode_plain(text)).encode(), CONFIG.language_model.dim)


TEXTS = [text_vector(f"a {colour} one") for colour in COLOURS]


async def test_rices_puts_the_most_similar_picture_last(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    ids, scores = by_similarity(media_vector(QUERY), [media_vector(media) for media in PICTURES])
    body = await complete(http, examples={"support_set": "colours", "k": 3, "strategy": "rices_image"})
    shots = body["fewshot"]["shots"]
    assert [one["id"] for one in shots] == ids[:3][::-1]
    assert [one["score"] for one in shots] == pytest.approx(scores[:3][::-1], abs=1e-6)


async def test_texts_are_compared_by_the_language_model(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    ids, _ = by_similarity(text_vector("pink?"), TEXTS)
    query = {"image": url(QUERY), "text": "pink?"}
    assert await chosen(http, query, k=4, strategy="rices_text") == ids[:4][::-1]


async def test_mixed_is_the_mean_of_both(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    query = {"image": url(QUERY), "text": "pink?"}
    response = await http.post("/v1/support_sets/colours/search", json={"query": query, "k": 6, "strategy": "mixed"})
    found = {one["id"]: one["score"] for one in response.json()["data"]}
    for place, media in enumerate(PICTURES):
        both = media_vector(QUERY) @ media_vector(media), text_vector("pink?") @ TEXTS[place]
        assert found[f"e{place}"] == pytest.approx(sum(both) / 2, abs=1e-6)
    assert list(found.values()) == sorted(found.values(), reverse=True)


async def test_examples_of_several_pictures_count_as_their_mean(
    http: httpx.AsyncClient, support_sets: SupportSets
) -> None:
    await support_sets.create("colours", [example(0, media=tuple(PICTURES[:2])), example(1, media=(PICTURES[2],))])
    response = await http.post("/v1/support_sets/colours/search", json={"query": {"image": url(QUERY)}})
    found = {one["id"]: one["score"] for one in response.json()["data"]}
    mean = media_vector(PICTURES[0]) + media_vector(PICTURES[1])
    assert found["e0"] == pytest.approx(media_vector(QUERY) @ mean / np.linalg.norm(mean), abs=1e-6)


async def test_orders(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    ids, _ = by_similarity(media_vector(QUERY), [media_vector(media) for media in PICTURES])
    rices: dict[str, Any] = {"strategy": "rices_image", "k": 4}
    assert await chosen(http, **rices, order="as_selected") == ids[:4]
    assert await chosen(http, **rices, order="similar_last") == ids[:4][::-1]
    assert await chosen(http, **rices, order="stored") == sorted(ids[:4])
    shuffled = [await chosen(http, **rices, order="shuffled", seed=seed) for seed in range(6)]
    assert {tuple(sorted(one)) for one in shuffled} == {tuple(sorted(ids[:4]))}
    assert len(set(map(tuple, shuffled))) > 2
    assert shuffled[0] == await chosen(http, **rices, order="shuffled", seed=0)


async def test_examples_are_embedded_once_and_for_good(
    http: httpx.AsyncClient, client: FakeClient, settings: Settings, colours: SupportSetInfo
) -> None:
    for _ in range(2):
        await chosen(http, strategy="rices_image")
    digests = [media.digest for media in client.embedded]
    assert digests == [*(media.digest for media in PICTURES), QUERY.digest, QUERY.digest]

    again = FakeClient()
    app = create_app(again, ServedModel("tiny", CONFIG, TOKENIZER, 128), settings, Metrics("tiny"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as restarted:
        await chosen(restarted, strategy="rices_image")
    await app.state.services.decoder.stop()
    assert [media.digest for media in again.embedded] == [QUERY.digest]


async def test_vectors_of_other_weights_are_not_compared_with(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    await chosen(http, strategy="rices_image")
    client.info = {"dtype": "bfloat16"}
    await chosen(http, strategy="rices_image")
    assert [media.digest for media in client.embedded].count(PICTURES[0].digest) == 2


async def test_a_search_tells_what_it_found(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    ids, _ = by_similarity(media_vector(QUERY), [media_vector(media) for media in PICTURES])
    response = await http.post("/v1/support_sets/colours/search", json={"query": {"image": url(QUERY)}, "k": 2})
    body = response.json()
    assert [one["id"] for one in body["data"]] == ids[:2]
    place = int(ids[0][1])
    assert body["data"][0] | {"score": 0} == {
        "id": ids[0],
        "object": "support_set.example",
        "score": 0,
        "media": [{"type": "image_id", "image_id": PICTURES[place].id}],
        "text": f"a {COLOURS[place]} one",
        "label": "warm" if place in (0, 5) else "cold",
        "question": "",
        "metadata": {},
    }
    assert {key: body[key] for key in ("object", "support_set", "version", "strategy")} == {
        "object": "list",
        "support_set": colours.id,
        "version": 1,
        "strategy": "rices_image",
    }


# what cannot be

SET: dict[str, Any] = {"support_set": "colours"}


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"shots": SHOTS, "examples": SET}, 400, "invalid_value", "examples"),
        ({"examples": {"support_set": "none"}}, 404, "support_set_not_found", None),
        ({"examples": {**SET, "k": 7}}, 400, "invalid_value", "examples.k"),
        ({"examples": {**SET, "k": 5}}, 400, "invalid_value", "examples.k"),
        ({"examples": {**SET, "strategy": "best"}}, 400, "invalid_value", "examples.strategy"),
        ({"examples": {**SET, "order": "similar_last"}}, 400, "invalid_value", "examples.order"),
        ({"examples": {**SET, "strategy": "rices_text"}}, 400, "invalid_value", "query"),
        ({"examples": SET, "template": "vqa"}, 400, "invalid_value", "query"),
        ({"examples": {**SET, "sead": 3}}, 422, "unsupported_parameter", "examples.sead"),
        ({"shots": [*SHOTS, {"answer": "a"}]}, 400, "invalid_value", "shots[2]"),
        ({"shots": [{"image": url(QUERY)}]}, 400, "invalid_value", "shots[0]"),
        ({"shots": [{**SHOTS[0], "question": "?"}]}, 400, "invalid_value", "shots[0].question"),
        ({"shots": [{"image": "data:x", "text": "a"}]}, 400, "invalid_value", "shots[0].image"),
        ({"shots": [{"image": "img_1", "text": "a"}]}, 404, "image_not_found", "shots[0].image"),
        ({"shots": SHOTS * 3}, 400, "invalid_value", "shots"),
        ({"query": {"image": url(QUERY), "text": "?"}}, 400, "invalid_value", "query.text"),
        ({"template": "none"}, 400, "invalid_value", "template"),
        ({"template": {"shot": "{media}{answer}", "queri": ""}}, 422, "unsupported_parameter", "template.queri"),
        ({"template": {"shot": "{media}{image}{answer}"}}, 400, "invalid_value", "template"),
        ({"temperature": -1}, 400, "invalid_value", "temperature"),
        ({"model": "other"}, 404, "model_not_found", None),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    http: httpx.AsyncClient,
    client: FakeClient,
    colours: SupportSetInfo,
    fields: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
) -> None:
    response = await post(http, **fields)
    assert refusal(response) == (status, code, param), response.text
    assert client.requests == []


async def test_an_example_without_what_is_shown_or_compared_is_named(
    http: httpx.AsyncClient, support_sets: SupportSets
) -> None:
    await support_sets.create("bare", [example(0), NewExample(id="bare", media=(), text="a word")])
    await support_sets.create("silent", [example(0), NewExample(id="mute", media=(PICTURES[1],))])
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"examples": {"support_set": "bare"}}, "examples.support_set", "bare"),
        ({"examples": {"support_set": "bare", "strategy": "rices_image", "k": 1}}, "examples.strategy", "bare"),
        ({"examples": {"support_set": "bare", "strategy": "balanced", "k": 1}}, "examples.strategy", "bare"),
        ({"examples": {"support_set": "silent"}}, "examples.support_set", "mute"),
    ]
    for fields, param, name in cases:
        response = await post(http, **fields)
        assert refusal(response) == (400, "invalid_value", param)
        assert repr(name) in response.json()["error"]["message"]


async def test_too_many_shots_are_refused_with_the_numbers_or_left_out_from_the_front(
    http: httpx.AsyncClient, client: FakeClient, support_sets: SupportSets
) -> None:
    await support_sets.create("colours", [example(place, text="x" * 21) for place in range(6)])
    examples = {"support_set": "colours", "k": 4}  # 31 tokens a shot, 8 the query
    response = await post(http, examples=examples)
    assert refusal(response) == (400, "context_length_exceeded", "examples.k")
    message = "the prompt has 132 tokens with its 4 shots and 8 without, this model reads 128"
    assert response.json()["error"]["message"] == message
    assert refusal(await post(http, shots=[{**SHOTS[0], "answer": "x" * 200}])) == (
        400,
        "context_length_exceeded",
        "shots",
    )
    for max_tokens, ids in [(16, ["e1", "e2", "e3"]), (58, ["e2", "e3"]), (120, [])]:
        body = await complete(http, examples=examples, truncate_shots=True, max_tokens=max_tokens)
        assert [one["id"] for one in body["fewshot"]["shots"]] == ids
        assert body["fewshot"]["shots_left_out"] == 4 - len(ids)
    assert refusal(await post(http, examples=examples, truncate_shots=True, max_tokens=121)) == (
        400,
        "context_length_exceeded",
        "max_tokens",
    )


@pytest.mark.parametrize("fields", [{"strategy": "random"}, {"k": 0}, {"query": {}}, {"query": {"image": "x", "k": 1}}])
async def test_a_search_that_cannot_be_is_refused(
    http: httpx.AsyncClient, colours: SupportSetInfo, fields: dict[str, Any]
) -> None:
    body = {"query": {"image": url(QUERY)}, **fields}
    response = await http.post("/v1/support_sets/colours/search", json=body)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["param"] == next(iter(fields)) + (".k" if "k" in fields.get("query", {}) else "")


async def test_shots_are_counted_and_searches_timed(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    await chosen(http, strategy="rices_image", k=3)
    lines = (await http.get("/metrics")).text.splitlines()
    for name in ("request_shots_sum", "retrieval_seconds_count"):
        (value,) = [line.rpartition(" ")[2] for line in lines if line.startswith(f"flamboyance:{name}")]
        assert float(value) == {"request_shots_sum": 3, "retrieval_seconds_count": 1}[name]


async def test_a_family_writes_its_own_way(client: FakeClient, settings: Settings) -> None:
    model = ServedModel("tiny", CONFIGS["flamingo"], TOKENIZER, max_model_len=128)
    client.answer = " a cat"
    app = create_app(client, model, settings, Metrics("tiny"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
        body = await complete(http, shots=SHOTS[:1])
    await app.state.services.decoder.stop()
    expected: list[Segment] = [
        Media(PICTURES[0].digest),
        Text("Output: warm"),
        END,
        Media(QUERY.digest),
        Text("Output:"),
    ]
    assert client.requests[0].token_ids == token_ids(*expected)
    assert body["choices"][0]["text"] == "a cat"
