"""Shots out of a support set over HTTP: which examples are chosen, against scores worked out here, and a set's search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from model.prompt import Media, Segment, Text
from server.media.source import EncodedMedia
from server.settings import Settings
from server.store.records import NewExample, SupportSetInfo
from server.store.support_sets import SupportSets
from tests.server.colours import (
    COLOURS,
    END,
    PICTURES,
    QUERY,
    application,
    chosen,
    complete,
    example,
    post,
    refusal,
    token_ids,
    url,
)
from tests.server.documented import CHECKED
from tests.server.fakes import CONFIG, TOKENIZER, FakeClient, unit_vector

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_media_per_request=5, keep_alive=0.05)


@pytest.fixture
def app(client: FakeClient, settings: Settings) -> FastAPI:
    return application(client, settings)


@pytest.fixture
def support_sets(app: FastAPI) -> SupportSets:
    found: SupportSets = app.state.services.support_sets
    return found


@pytest.fixture
async def colours(support_sets: SupportSets) -> SupportSetInfo:
    return await support_sets.create("colours", [example(place) for place in range(6)])


# shots out of a support set


async def test_examples_are_written_as_shots_would_be(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    body = await complete(http, examples={"support_set": "colours", "k": 2}, template="classification")
    expected: list[Segment] = []
    for place, label in ((0, "warm"), (1, "cold")):
        expected += [Media(PICTURES[place].digest), Text(f"Output:{label}"), END]
    assert client.requests[0].prompt.token_ids == token_ids(*expected, Media(QUERY.digest), Text("Output:"))
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
    app = application(again, settings)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://server", event_hooks=CHECKED
    ) as restarted:
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


async def test_an_empty_set_has_nothing_to_find(http: httpx.AsyncClient, support_sets: SupportSets) -> None:
    await support_sets.create("colours", [])
    response = await http.post("/v1/support_sets/colours/search", json={"query": {"image": url(QUERY)}})
    assert (response.status_code, response.json()["data"]) == (200, [])
    assert await chosen(http) == []
    examples = {"support_set": "colours", "k": 1, "strategy": "rices_image"}
    assert refusal(await post(http, examples=examples)) == (400, "invalid_value", "examples.k")


# what cannot be


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
