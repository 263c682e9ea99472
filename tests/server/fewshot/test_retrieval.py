"""Shots from a support set and its search over HTTP, against scores that are computed here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from model.prompt import Media, Segment, Text
from server.errors import EngineNotReady
from server.fewshot import retrieval
from server.media.source import EncodedMedia
from server.settings import Settings
from server.store.records import NewExample, SupportSet, SupportSetInfo
from server.store.support_sets import SupportSets
from tests.server.colours import (
    COLOURS,
    END,
    IMAGES,
    QUERY,
    app,
    application,
    colours,
    complete,
    example,
    post,
    refusal,
    settings,
    shot_ids,
    support_sets,
    token_ids,
    url,
)
from tests.server.documented import CHECKED
from tests.server.fakes import CONFIG, TOKENIZER, FakeClient, unit_vector

__all__ = ["app", "colours", "settings", "support_sets"]  # fixtures

pytestmark = pytest.mark.anyio


# shots from a support set


FIRST_TWO = {"support_set": "colours", "k": 2, "strategy": "first"}


async def test_examples_are_written_like_shots_of_the_request(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    body = await complete(http, examples=FIRST_TWO, template="classification")
    expected: list[Segment] = []
    for index, label in ((0, "warm"), (1, "cold")):
        expected += [Media(IMAGES[index].digest), Text(f"Output:{label}"), END]
    assert client.requests[0].prompt.token_ids == token_ids(*expected, Media(QUERY.digest), Text("Output:"))
    assert [media.data for media in client.media[0].values()] == [IMAGES[0].data, IMAGES[1].data, QUERY.data]
    assert body["fewshot"] | {"shots": []} == {
        "template": "classification",
        "strategy": "first",
        "support_set": colours.id,
        "version": 1,
        "shots": [],
        "shots_left_out": 0,
    }
    assert body["usage"]["fewshot_details"]["support_set"] == colours.id


async def test_an_old_version_does_not_change(
    http: httpx.AsyncClient, colours: SupportSetInfo, support_sets: SupportSets
) -> None:
    await support_sets.remove_examples("colours", ["e0"])
    assert await shot_ids(http, k=2, strategy="first") == ["e1", "e2"]
    assert await shot_ids(http, k=2, version=1, strategy="first") == ["e0", "e1"]
    response = await post(http, examples={"support_set": "colours", "version": 7})
    assert refusal(response)[:2] == (404, "support_set_not_found")


async def test_the_default_is_four_shots_or_all_of_fewer(http: httpx.AsyncClient, support_sets: SupportSets) -> None:
    await support_sets.create("colours", [example(index) for index in range(6)])
    await support_sets.create("few", [example(index) for index in range(3)])
    assert await shot_ids(http, strategy="first") == ["e0", "e1", "e2", "e3"]
    assert await shot_ids(http, support_set="few") == ["e0", "e1", "e2"]


@pytest.mark.parametrize("strategy", ["random", "balanced"])
async def test_a_seed_selects_the_same_examples_again(
    http: httpx.AsyncClient, colours: SupportSetInfo, strategy: str
) -> None:
    seeds = [await shot_ids(http, strategy=strategy, seed=seed) for seed in range(8)]
    assert seeds == [await shot_ids(http, strategy=strategy, seed=seed) for seed in range(8)]
    assert len(set(map(tuple, seeds))) > 4
    assert all(len(set(ids)) == 4 for ids in seeds)


async def test_balanced_selects_each_label_equally_often(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    for seed in range(5):
        body = await complete(http, examples={"support_set": "colours", "k": 4, "strategy": "balanced", "seed": seed})
        labels = [shot["label"] for shot in body["fewshot"]["shots"]]
        assert sorted(labels[:2]) == sorted(labels[2:]) == ["cold", "warm"]


# similarity


def by_similarity(query: np.ndarray, vectors: Sequence[np.ndarray]) -> tuple[list[str], list[float]]:
    """Return example ids and scores, highest score first."""
    scores = [float(query.astype(np.float64) @ vector) for vector in vectors]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [f"e{index}" for index in order], [scores[index] for index in order]


def media_vector(media: EncodedMedia) -> np.ndarray:
    return unit_vector(media.digest, CONFIG.vision.feature_dim)


def text_vector(text: str) -> np.ndarray:
    return unit_vector(repr(TOKENIZER.encode_plain(text)).encode(), CONFIG.language_model.dim)


TEXTS = [text_vector(f"a {colour} one") for colour in COLOURS]


async def test_rices_puts_the_most_similar_image_last(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    ids, scores = by_similarity(media_vector(QUERY), [media_vector(media) for media in IMAGES])
    body = await complete(http, examples={"support_set": "colours", "k": 3, "strategy": "rices_image"})
    shots = body["fewshot"]["shots"]
    assert [shot["id"] for shot in shots] == ids[:3][::-1]
    assert [shot["score"] for shot in shots] == pytest.approx(scores[:3][::-1], abs=1e-6)


async def test_rices_text_compares_features_of_the_language_model(
    http: httpx.AsyncClient, colours: SupportSetInfo
) -> None:
    ids, _ = by_similarity(text_vector("pink?"), TEXTS)
    query = {"image": url(QUERY), "text": "pink?"}
    assert await shot_ids(http, query, k=4, strategy="rices_text") == ids[:4][::-1]


async def test_mixed_scores_are_the_mean_of_both(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    query = {"image": url(QUERY), "text": "pink?"}
    response = await http.post("/v1/support_sets/colours/search", json={"query": query, "k": 6, "strategy": "mixed"})
    scores = {example["id"]: example["score"] for example in response.json()["data"]}
    for index, media in enumerate(IMAGES):
        both = media_vector(QUERY) @ media_vector(media), text_vector("pink?") @ TEXTS[index]
        assert scores[f"e{index}"] == pytest.approx(sum(both) / 2, abs=1e-6)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)


async def test_an_example_with_several_images_is_compared_by_their_mean(
    http: httpx.AsyncClient, support_sets: SupportSets
) -> None:
    await support_sets.create("colours", [example(0, media=tuple(IMAGES[:2])), example(1, media=(IMAGES[2],))])
    response = await http.post("/v1/support_sets/colours/search", json={"query": {"image": url(QUERY)}})
    scores = {example["id"]: example["score"] for example in response.json()["data"]}
    mean = media_vector(IMAGES[0]) + media_vector(IMAGES[1])
    assert scores["e0"] == pytest.approx(media_vector(QUERY) @ mean / np.linalg.norm(mean), abs=1e-6)


async def test_several_images_count_as_much_as_a_text(http: httpx.AsyncClient, support_sets: SupportSets) -> None:
    await support_sets.create("colours", [example(0, media=tuple(IMAGES[:2])), example(1)])
    query = {"image": url(QUERY), "text": "pink?"}
    response = await http.post("/v1/support_sets/colours/search", json={"query": query, "k": 2, "strategy": "mixed"})
    scores = {example["id"]: example["score"] for example in response.json()["data"]}
    mean = media_vector(IMAGES[0]) + media_vector(IMAGES[1])
    of_images = media_vector(QUERY) @ mean / np.linalg.norm(mean)
    assert scores["e0"] == pytest.approx((of_images + text_vector("pink?") @ TEXTS[0]) / 2, abs=1e-6)


async def test_questions_are_compared_instead_of_texts(http: httpx.AsyncClient, support_sets: SupportSets) -> None:
    await support_sets.create("colours", [example(0, question="which one?"), example(1)])
    search = {"query": {"text": "pink?"}, "k": 2, "strategy": "rices_text"}
    response = await http.post("/v1/support_sets/colours/search", json=search)
    scores = {example["id"]: example["score"] for example in response.json()["data"]}
    assert scores["e0"] == pytest.approx(float(text_vector("pink?") @ text_vector("which one?")), abs=1e-6)
    assert scores["e1"] == pytest.approx(float(text_vector("pink?") @ TEXTS[1]), abs=1e-6)


async def test_each_version_is_searched_in_its_own_examples(
    http: httpx.AsyncClient, colours: SupportSetInfo, support_sets: SupportSets
) -> None:
    ids, _ = by_similarity(media_vector(QUERY), [media_vector(media) for media in IMAGES])
    rices: dict[str, Any] = {"strategy": "rices_image", "order": "as_selected", "k": 4}
    assert await shot_ids(http, **rices) == ids[:4]
    await support_sets.remove_examples("colours", ids[:1])
    assert await shot_ids(http, **rices) == ids[1:5]
    assert await shot_ids(http, **rices, version=1) == ids[:4]


async def test_each_order_arranges_the_same_examples(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    ids, _ = by_similarity(media_vector(QUERY), [media_vector(media) for media in IMAGES])
    rices: dict[str, Any] = {"strategy": "rices_image", "k": 4}
    assert await shot_ids(http, **rices, order="as_selected") == ids[:4]
    assert await shot_ids(http, **rices, order="similar_last") == ids[:4][::-1]
    assert await shot_ids(http, **rices, order="stored") == sorted(ids[:4])
    shuffled = [await shot_ids(http, **rices, order="shuffled", seed=seed) for seed in range(6)]
    assert {tuple(sorted(selected)) for selected in shuffled} == {tuple(sorted(ids[:4]))}
    assert len(set(map(tuple, shuffled))) > 2
    assert shuffled[0] == await shot_ids(http, **rices, order="shuffled", seed=0)


@pytest.mark.parametrize("route", ["fewshot/completions", "classify"])
async def test_a_compared_query_is_embedded_while_the_version_is_read(
    http: httpx.AsyncClient,
    client: FakeClient,
    colours: SupportSetInfo,
    route: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, embed, read = asyncio.Event(), client.embed, SupportSets.get_version

    async def note_and_embed(media: Sequence[EncodedMedia]) -> NDArray[np.float32]:
        begun.set()
        return await embed(media)

    async def read_later(support_sets: SupportSets, name: str, version: int | None = None) -> SupportSet:
        await asyncio.wait_for(begun.wait(), timeout=10)
        return await read(support_sets, name, version)

    monkeypatch.setattr(client, "embed", note_and_embed)
    monkeypatch.setattr(SupportSets, "get_version", read_later)
    examples = {"support_set": "colours"} | ({} if route == "classify" else {"strategy": "rices_image"})
    response = await http.post(f"/v1/{route}", json={"query": {"image": url(QUERY)}, "examples": examples})
    assert response.status_code == 200, response.text
    assert client.embedded[0].digest == QUERY.digest


@pytest.mark.parametrize("fields", [{"strategy": "first"}, {"strategy": "rices_image", "k": 0}])
async def test_a_query_that_is_not_compared_is_not_embedded(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo, fields: dict[str, Any]
) -> None:
    await shot_ids(http, **fields)
    assert client.embedded == []


@pytest.mark.parametrize(
    ("examples", "code"),
    [({"support_set": "unknown"}, "support_set_not_found"), ({"support_set": "colours", "k": 99}, "invalid_value")],
)
async def test_an_error_of_the_set_is_answered_before_one_of_the_embedding(
    http: httpx.AsyncClient,
    client: FakeClient,
    colours: SupportSetInfo,
    examples: dict[str, Any],
    code: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(media: Sequence[EncodedMedia]) -> NDArray[np.float32]:
        raise EngineNotReady("the engine is loading")

    monkeypatch.setattr(client, "embed", fail)
    response = await post(http, examples={"strategy": "rices_image", **examples})
    assert refusal(response)[1] == code


async def test_a_set_that_is_not_found_is_refused_although_the_query_is_embedded(
    http: httpx.AsyncClient, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []

    async def embed_for_ever(media: Sequence[EncodedMedia]) -> NDArray[np.float32]:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)
        raise AssertionError("the embedding was not cancelled")

    monkeypatch.setattr(client, "embed", embed_for_ever)
    response = await post(http, examples={"support_set": "unknown", "strategy": "rices_image"})
    assert refusal(response)[:2] == (404, "support_set_not_found")
    assert ended == [True]


async def test_examples_are_embedded_only_once_even_across_restarts(
    http: httpx.AsyncClient, client: FakeClient, settings: Settings, colours: SupportSetInfo
) -> None:
    for _ in range(2):
        await shot_ids(http, strategy="rices_image")
    digests = [media.digest for media in client.embedded]
    assert digests == [QUERY.digest, *(media.digest for media in IMAGES)]

    second_client = FakeClient()
    app = application(second_client, settings)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://localhost", event_hooks=CHECKED
    ) as restarted:
        await shot_ids(restarted, strategy="rices_image")
    await app.state.services.decoder.stop()
    assert [media.digest for media in second_client.embedded] == [QUERY.digest]


async def test_vectors_of_other_weights_are_not_used(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    async def num_embedded(**info: str) -> int:
        client.info = info
        await shot_ids(http, strategy="rices_image")
        return [media.digest for media in client.embedded].count(IMAGES[0].digest)

    assert await num_embedded(dtype="float32") == 1
    assert await num_embedded(dtype="bfloat16") == 2
    assert await num_embedded(dtype="bfloat16", weight_format="native") == 2  # as stored before there were formats
    assert await num_embedded(dtype="bfloat16", weight_format="fp8") == 3
    assert await num_embedded(dtype="bfloat16", weight_format="int8") == 4
    assert await num_embedded(dtype="bfloat16", weight_format="fp8") == 4


async def test_vectors_of_media_that_were_decoded_otherwise_are_not_used(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shot_ids(http, strategy="rices_image")
    monkeypatch.setattr(retrieval, "DECODING", "sideways")
    await shot_ids(http, strategy="rices_image")
    assert [media.digest for media in client.embedded].count(IMAGES[0].digest) == 2


async def test_a_search_returns_examples_with_their_scores(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    ids, _ = by_similarity(media_vector(QUERY), [media_vector(media) for media in IMAGES])
    response = await http.post("/v1/support_sets/colours/search", json={"query": {"image": url(QUERY)}, "k": 2})
    body = response.json()
    assert [example["id"] for example in body["data"]] == ids[:2]
    index = int(ids[0][1])
    assert body["data"][0] | {"score": 0} == {
        "id": ids[0],
        "object": "support_set.example",
        "score": 0,
        "media": [{"type": "image_id", "image_id": IMAGES[index].id}],
        "text": f"a {COLOURS[index]} one",
        "label": "warm" if index in (0, 5) else "cold",
        "question": "",
        "metadata": {},
    }
    assert {key: body[key] for key in ("object", "support_set", "version", "strategy")} == {
        "object": "list",
        "support_set": colours.id,
        "version": 1,
        "strategy": "rices_image",
    }


async def test_a_search_in_an_empty_set_returns_no_examples(http: httpx.AsyncClient, support_sets: SupportSets) -> None:
    await support_sets.create("colours", [])
    response = await http.post("/v1/support_sets/colours/search", json={"query": {"image": url(QUERY)}})
    assert (response.status_code, response.json()["data"]) == (200, [])
    assert await shot_ids(http) == []
    examples = {"support_set": "colours", "k": 1, "strategy": "rices_image"}
    assert refusal(await post(http, examples=examples)) == (400, "invalid_value", "examples.k")


# invalid requests


async def test_an_error_names_the_example_that_lacks_a_required_field(
    http: httpx.AsyncClient, support_sets: SupportSets
) -> None:
    await support_sets.create("bare", [example(0), NewExample(id="bare", media=(), text="a word")])
    await support_sets.create("silent", [example(0), NewExample(id="mute", media=(IMAGES[1],))])
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


@pytest.mark.parametrize("strategy", ["rices_image", "rices_text", "mixed"])
async def test_a_refused_search_names_its_strategy(
    http: httpx.AsyncClient, support_sets: SupportSets, strategy: str
) -> None:
    examples = [NewExample(id="bare", media=(), text="a word"), NewExample(id="mute", media=(IMAGES[1],))]
    await support_sets.create("mixture", examples)
    query = {"image": url(QUERY), "text": "a word"}
    response = await http.post("/v1/support_sets/mixture/search", json={"query": query, "strategy": strategy})
    assert refusal(response) == (400, "invalid_value", "strategy")


@pytest.mark.parametrize("fields", [{"strategy": "random"}, {"k": 0}, {"query": {}}, {"query": {"image": "x", "k": 1}}])
async def test_invalid_searches_are_refused(
    http: httpx.AsyncClient, colours: SupportSetInfo, fields: dict[str, Any]
) -> None:
    body = {"query": {"image": url(QUERY)}, **fields}
    response = await http.post("/v1/support_sets/colours/search", json=body)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["param"] == next(iter(fields)) + (".k" if "k" in fields.get("query", {}) else "")


async def test_shots_are_counted_and_searches_timed(http: httpx.AsyncClient, colours: SupportSetInfo) -> None:
    await shot_ids(http, strategy="rices_image", k=3)
    lines = (await http.get("/metrics")).text.splitlines()
    for name in ("request_shots_sum", "retrieval_seconds_count"):
        (value,) = [line.rpartition(" ")[2] for line in lines if line.startswith(f"flamboyance:{name}")]
        assert float(value) == {"request_shots_sum": 3, "retrieval_seconds_count": 1}[name]
