"""Routes of support sets: examples come back unchanged by version, and errors name the invalid field."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api import examples as api_examples
from server.api.routes import support_sets
from server.media.source import EncodedMedia
from server.media.turns import Job
from server.settings import Settings
from server.store.records import NewExample
from server.store.support_sets import IdempotencyKey
from tests.server.api.test_sse import Caller
from tests.server.conftest import data_url, image_part, png
from tests.server.fakes import AS_JSON, TOKENIZER, FakeClient

pytestmark = pytest.mark.anyio

SETS = "/v1/support_sets"


def example(name: str, colour: str | None = None, **fields: Any) -> dict[str, Any]:
    media = {"media": [image_part(png(colour))]} if colour else {}
    return {"id": name, "text": f"text of {name}", **media, **fields}


async def create(http: httpx.AsyncClient, name: str = "s", **fields: Any) -> dict[str, Any]:
    response = await http.post(SETS, json={"name": name, **fields})
    assert response.status_code == 200, response.text
    card: dict[str, Any] = response.json()
    return card


async def ids(http: httpx.AsyncClient, query: str = "") -> list[str]:
    return [example["id"] for example in (await http.get(f"{SETS}/s/examples{query}")).json()["data"]]


def error(response: httpx.Response) -> tuple[int, str, str | None]:
    body = response.json()["error"]
    return response.status_code, body["code"], body["param"]


@pytest.mark.parametrize("path", [SETS, f"{SETS}/s/examples"])
async def test_examples_are_not_decoded_further_if_their_client_disconnects(
    app: FastAPI, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    async def decode(media: EncodedMedia, job: Job) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(media.id)

    started, ended = asyncio.Event(), list[str]()
    await create(http)
    monkeypatch.setattr(app.state.services.decoder, "decode", decode)
    caller = Caller(app, {"examples": [example("a", "red"), example("b", "blue")]}, path)
    await asyncio.wait_for(started.wait(), 20)
    caller.disconnected.set()
    await asyncio.wait_for(caller.task, 20)
    assert len(ended) == 2
    assert [(card["version"], card["num_media"]) for card in (await http.get(SETS)).json()["data"]] == [(1, 0)]


async def test_a_set_is_created_and_returned(http: httpx.AsyncClient) -> None:
    before = time.time()
    examples = [example("a", "red", label="warm", question="?"), example("b", "red", label="warm"), example("c")]
    card = await create(http, examples=examples, metadata={"owner": "me"}, ttl_seconds=60)
    assert before <= card["created_at"] == card["updated_at"] <= time.time()
    assert card["expires_at"] == pytest.approx(card["created_at"] + 60, abs=5)
    for key in ("created_at", "updated_at", "expires_at"):
        card.pop(key)
    assert card.pop("id").startswith("ss_")
    assert card == {
        "object": "support_set",
        "name": "s",
        "version": 1,
        "latest_version": 1,
        "pinned": False,
        "metadata": {"owner": "me"},
        "num_examples": 3,
        "num_media": 1,
        "bytes": len(png("red")),
        "label_counts": {"warm": 2},
        "status": "pending",
        "warm": None,
        "example_ids": ["a", "b", "c"],
    }
    page = (await http.get(f"{SETS}/s/examples")).json()
    (media,) = page["data"][0].pop("media")
    assert media["type"] == "image_id"
    assert (await http.get(f"/v1/images/{media['image_id']}/content")).content == png("red")
    assert page["data"][0] == {
        "id": "a",
        "object": "support_set.example",
        "text": "text of a",
        "question": "?",
        "label": "warm",
        "metadata": {},
    }
    assert (page["version"], page["has_more"], page["first_id"], page["last_id"]) == (1, False, "a", "c")


async def test_media_may_be_a_url_an_id_or_the_short_form(http: httpx.AsyncClient) -> None:
    upload = await http.post("/v1/images", content=png("green"), headers={"Content-Type": "image/png"})
    uploaded_id = upload.json()["id"]
    examples = [
        {"text": "1", "image": data_url(png("green"))},
        {"text": "2", "image": uploaded_id},
        {"text": "3", "media": [{"type": "image_id", "image_id": uploaded_id}]},
    ]
    card = await create(http, examples=examples)
    assert (card["num_examples"], card["num_media"]) == (3, 1)
    assert await ids(http) == card["example_ids"]
    for stored in (await http.get(f"{SETS}/s/examples")).json()["data"]:
        assert stored["id"].startswith("ex_")
        assert stored["media"] == [{"type": "image_id", "image_id": uploaded_id}]


async def test_returned_examples_can_be_sent_again(http: httpx.AsyncClient) -> None:
    await create(http, examples=[example("a", "red", metadata={"x": [1, None]}), example("b")])
    examples = (await http.get(f"{SETS}/s/examples")).json()["data"]
    fields = [{key: value for key, value in item.items() if key != "object"} for item in examples]
    await create(http, "copy", examples=fields)
    assert (await http.get(f"{SETS}/copy/examples")).json()["data"] == examples


async def test_each_change_of_examples_makes_a_version(http: httpx.AsyncClient) -> None:
    card = await create(http, examples=[example("a"), example("b")])
    put = await http.post(f"{SETS}/{card['id']}/examples", json={"examples": [example("b", text="new"), example("c")]})
    assert (put.json()["version"], put.json()["num_examples"]) == (2, 3)
    gone = await http.delete(f"{SETS}/s/examples/a")
    assert (gone.json()["version"], gone.json()["num_examples"]) == (3, 2)
    gone = await http.delete(f"{SETS}/s/examples", params={"id": "b,c", "expected_version": 3})
    assert (gone.json()["version"], gone.json()["num_examples"]) == (4, 0)
    assert [await ids(http, f"?version={n}") for n in (1, 2, 3, 4)] == [["a", "b"], ["a", "b", "c"], ["b", "c"], []]
    replaced = await http.get(f"{SETS}/s/examples/b", params={"version": 2})
    assert replaced.json()["text"] == "new"
    old = (await http.get(f"{SETS}/s", params={"version": 2})).json()
    assert (old["version"], old["latest_version"], old["num_examples"]) == (2, 4, 3)
    versions = (await http.get(f"{SETS}/s/versions", params={"limit": 2, "after": 1})).json()
    assert [(v["version"], v["num_examples"], v["num_added"]) for v in versions["data"]] == [(2, 3, 1), (3, 2, 0)]
    assert versions["has_more"]


async def test_example_ids_are_in_the_order_of_the_request(http: httpx.AsyncClient) -> None:
    card = await create(http, examples=[example("a"), {"text": "b"}])
    put = await http.post(f"{SETS}/s/examples", json={"examples": [{"text": "c"}, example("a"), {"text": "d"}]})
    example_ids = put.json()["example_ids"]
    assert example_ids[1] == "a"
    assert await ids(http) == [*card["example_ids"], example_ids[0], example_ids[2]]
    assert "example_ids" not in (await http.get(f"{SETS}/s")).json()


async def test_unknown_sets_versions_and_examples_are_not_found(http: httpx.AsyncClient) -> None:
    await create(http, examples=[example("a")])
    unknown = (404, "support_set_not_found", None)
    assert error(await http.get(f"{SETS}/other")) == unknown
    assert error(await http.get(f"{SETS}/%00")) == unknown
    assert error(await http.patch(f"{SETS}/other", json={})) == unknown
    assert error(await http.post(f"{SETS}/other/examples", json={"examples": [example("a")]})) == unknown
    assert error(await http.post(f"{SETS}/other/warm")) == unknown
    assert error(await http.get(f"{SETS}/s?version=2")) == (404, "support_set_not_found", "version")
    assert error(await http.get(f"{SETS}/s/examples/b"))[:2] == (404, "example_not_found")
    assert error(await http.delete(f"{SETS}/s/examples/b")) == (404, "example_not_found", "id")
    assert error(await http.delete(f"{SETS}/s/examples/%00"))[:2] == (404, "example_not_found")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"name": "ss_1"}, 400, "name"),
        ({"name": "a b"}, 400, "name"),
        ({"ttl_seconds": 0}, 400, "ttl_seconds"),
        ({"ttl_seconds": 5, "expires_at": time.time() + 5000}, 400, None),
        ({"expires_at": 1e9}, 400, "expires_at"),
        ({"model": "x"}, 422, "model"),
        ({"metadata": {"x": "y" * 20000}}, 400, "metadata"),
        ({"examples": [example("a"), example("a")]}, 400, "examples[1].id"),
        ({"examples": [{"id": "a"}]}, 400, "examples[0]"),
        ({"examples": [example("a b")]}, 400, "examples[0].id"),
        ({"examples": [example("a", text="\0")]}, 400, "examples[0].text"),
        ({"examples": [example("a", label="x" * 1025)]}, 400, "examples[0].label"),
        ({"examples": [example("a", weight=1)]}, 422, "examples[0].weight"),
        ({"examples": [example("a"), {"image": data_url(b"no image")}]}, 400, "examples[1].image"),
        ({"examples": [{"media": [image_part(b"no image")]}]}, 400, "examples[0].media[0].image_url.url"),
        ({"examples": [{"image": "img_" + "0" * 64}]}, 404, "examples[0].image"),
        ({"examples": [{"media": [{"type": "image_id", "image_id": "x"}]}]}, 404, "examples[0].media[0].image_id"),
    ],
)
async def test_an_error_names_the_invalid_field(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str | None
) -> None:
    response = await http.post(SETS, json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert (await http.get(SETS)).json()["data"] == []


async def test_a_change_is_refused_if_the_version_is_not_the_expected_one(http: httpx.AsyncClient) -> None:
    await create(http, examples=[example("a")])
    assert (await http.post(f"{SETS}/s/examples", json={"examples": [example("b")], "expected_version": 1})).is_success
    conflict = (409, "version_conflict", "expected_version")
    outdated = {"expected_version": 1}
    assert error(await http.post(f"{SETS}/s/examples", json={"examples": [example("c")], **outdated})) == conflict
    assert error(await http.patch(f"{SETS}/s", json={"pinned": True, **outdated})) == conflict
    assert error(await http.delete(f"{SETS}/s/examples/a", params=outdated)) == conflict
    assert error(await http.delete(f"{SETS}/s/examples", params={"id": "a", **outdated})) == conflict
    assert error(await http.delete(f"{SETS}/s", params=outdated)) == conflict
    assert error(await http.post(SETS, json={"name": "s"})) == (409, "name_taken", "name")


async def test_an_error_of_a_name_says_what_a_name_may_be(http: httpx.AsyncClient) -> None:
    characters = "ASCII letters, digits and the characters _.:-"
    examples = [{"id": "a/b", "label": "c"}]
    for field, body, message in (
        ("name", {"name": "a b"}, f"at most 128 {characters}, beginning with a letter or digit"),
        ("examples[0].id", {"examples": examples}, f"1 to 128 {characters}, and not of full stops alone"),
    ):
        refused = (await http.post(SETS, json=body)).json()["error"]
        assert refused["message"] == f"{field}: must be {message}"
    listed = (await http.get(SETS, params={"after": "a b"})).json()["error"]
    assert listed["message"] == f"after: must be 1 to 128 {characters}"
    completed = (await http.post("/v1/completions", json={"prompt": "a", "request_id": "a b"})).json()["error"]
    assert completed["message"] == f"request_id: must be 1 to 128 {characters}"


async def test_an_id_is_no_segment_of_a_path_that_clients_remove(http: httpx.AsyncClient) -> None:
    for refused in (".", "..", "." * 128, "a" * 129, "." * 127 + "ab", ""):
        body = {"examples": [{"id": refused, "label": "c"}]}
        assert error(await http.post(SETS, json=body)) == (400, "invalid_value", "examples[0].id")
    accepted = ["..a", "a..", ".:", "-", "_.", "." * 127 + "a", "a" * 128]
    assert (await create(http, examples=[{"id": id, "label": "c"} for id in accepted]))["example_ids"] == accepted
    for id in accepted:
        assert (await http.get(f"{SETS}/s/examples/{id}")).json()["id"] == id


async def test_a_patch_changes_the_named_fields_and_null_removes_them(http: httpx.AsyncClient) -> None:
    await create(http, ttl_seconds=60, metadata={"a": 1})
    card = (await http.patch(f"{SETS}/s", json={"pinned": True, "ttl_seconds": 600})).json()
    assert card["pinned"]
    assert card["expires_at"] - card["updated_at"] == pytest.approx(600, abs=1)
    card = (await http.patch(f"{SETS}/s", json={"expires_at": None, "metadata": None, "pinned": False})).json()
    assert (card["expires_at"], card["metadata"], card["pinned"], card["name"]) == (None, {}, False, "s")
    card = (await http.patch(f"{SETS}/s", json={"name": None})).json()
    assert card["name"] is None
    assert error(await http.patch(f"{SETS}/{card['id']}", json={"name": "a b"})) == (400, "invalid_value", "name")
    assert card["version"] == 1


async def test_an_expired_set_is_not_found(http: httpx.AsyncClient) -> None:
    card = await create(http, ttl_seconds=0.05)
    await asyncio.sleep(0.06)
    for name in ("s", card["id"]):
        assert error(await http.get(f"{SETS}/{name}")) == (404, "support_set_not_found", None)
    assert (await http.get(SETS)).json()["data"] == []


async def test_lists_come_in_pages(http: httpx.AsyncClient) -> None:
    created = [(await create(http, f"s{n}"))["id"] for n in range(3)]
    first = (await http.get(SETS, params={"limit": 2})).json()
    assert [card["id"] for card in first["data"]] == created[:2]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, created[0], created[1])
    rest = (await http.get(SETS, params={"after": first["last_id"]})).json()
    assert [card["id"] for card in rest["data"]] == created[2:]
    assert not rest["has_more"]
    await create(http, examples=[example(name) for name in "abcd"])
    assert await ids(http, "?limit=2&after=a") == ["b", "c"]
    assert error(await http.get(f"{SETS}/s/examples?after=z")) == (400, "invalid_value", "after")
    assert error(await http.get(f"{SETS}?limit=0")) == (400, "invalid_value", "limit")
    assert error(await http.get(f"{SETS}?order=desc")) == (422, "unsupported_parameter", "order")


async def test_a_repeated_request_gets_its_first_response(http: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "once"}
    body = {"name": "s", "examples": [{"image": data_url(png()), "text": "a"}]}
    first = await http.post(SETS, json=body, headers=headers)
    assert first.is_success
    assert (await http.post(SETS, json=body, headers=headers)).json() == first.json()
    conflict = await http.post(SETS, json={"name": "t"}, headers=headers)
    assert error(conflict) == (409, "idempotency_conflict", None)
    more = {"examples": [{"text": "b"}]}
    put = [await http.post(f"{SETS}/s/examples", json=more, headers=headers) for _ in range(3)]
    assert [response.json()["version"] for response in put] == [2, 2, 2]
    assert [*first.json()["example_ids"], *put[2].json()["example_ids"]] == await ids(http)
    bad = await http.post(SETS, json={}, headers={"Idempotency-Key": "a b"})
    assert error(bad) == (400, "invalid_value", "Idempotency-Key")


async def test_a_deleted_set_releases_its_media(http: httpx.AsyncClient, app: FastAPI) -> None:
    await create(http, examples=[example("a", "red")])
    media = (await http.get(f"{SETS}/s/examples/a")).json()["media"][0]["image_id"]
    assert (await http.delete(f"{SETS}/s/examples/a")).json()["version"] == 2
    refused = await http.delete(f"/v1/images/{media}")  # the first version has it
    assert error(refused)[:2] == (409, "image_in_use")
    assert refused.json()["error"]["message"] == f"a version of a support set contains {media!r}: delete the set first"
    deleted = (await http.delete(f"{SETS}/s")).json()
    assert deleted == {"id": deleted["id"], "object": "support_set", "deleted": True}
    assert error(await http.get(f"{SETS}/s"))[0] == 404
    await app.state.services.support_sets.sweep()
    assert error(await http.get(f"/v1/images/{media}")) == (404, "image_not_found", "image_id")


async def test_warming_encodes_each_media_item_once_with_the_last_priority(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    await create(http, examples=[example("a", "red"), example("b", "blue"), example("c", "red")])
    card = (await http.post(f"{SETS}/s/warm", json={"wait": True})).json()
    assert card["status"] == "ready"
    assert card["warm"]["num_media"] == len(client.requests) == 2
    assert card["warm"]["media_encoded"] == 2 * client.admitted.media_encoded
    for request, media in zip(client.requests, client.media, strict=True):
        assert (request.prompt.media, request.sampling.max_tokens) == (list(media), 0)
        assert request.priority > 1000
    assert (await http.get(f"{SETS}/s")).json()["status"] == "ready"
    await http.post(f"{SETS}/s/examples", json={"examples": [example("d")]})
    assert (await http.get(f"{SETS}/s")).json()["status"] == "pending"
    assert (await http.get(f"{SETS}/s?version=1")).json()["status"] == "ready"
    client.info = {"pid": "of another worker"}
    assert (await http.get(f"{SETS}/s?version=1")).json()["status"] == "pending"


async def test_warming_computes_the_shots_that_begin_a_request(http: httpx.AsyncClient, client: FakeClient) -> None:
    await create(http, examples=[example(name, colour) for name, colour in (("a", "red"), ("b", "blue"))])
    card = (await http.post(f"{SETS}/s/warm", json={"wait": True, "template": "caption", "k": 2})).json()
    assert card["status"] == "ready"
    prefix = client.requests[-1].prompt.token_ids
    assert card["warm"]["prompt_tokens"] == len(prefix)
    query = {"query": {"image": data_url(png("green"))}, "template": "caption", "max_tokens": 1}
    response = await http.post(
        "/v1/fewshot/completions", json={"examples": {"support_set": "s", "k": 2, "order": "stored"}, **query}
    )
    assert response.is_success, response.text
    shared = next(
        i for i, (a, b) in enumerate(zip(prefix, client.requests[-1].prompt.token_ids, strict=False)) if a != b
    )
    end_of_shots = len(prefix) - 1 - prefix[::-1].index(TOKENIZER.id_of("<|endofchunk|>"))
    assert shared > end_of_shots
    for param, fields in (
        ("template", {"template": "none"}),
        ("k", {"k": 2}),
        ("k", {"template": "caption", "k": 3}),
        ("template", {"template": "vqa", "k": 2}),
    ):
        assert error(await http.post(f"{SETS}/s/warm", json=fields)) == (400, "invalid_value", param)


async def test_failed_warming_reports_the_error(http: httpx.AsyncClient, client: FakeClient, app: FastAPI) -> None:
    await create(http, examples=[example("a", "red")])
    media = (await http.get(f"{SETS}/s/examples/a")).json()["media"][0]["image_id"]
    app.state.services.media_store.delete(media)
    card = (await http.post(f"{SETS}/s/warm", json={"wait": True})).json()
    assert card["status"] == "failed"
    assert media in card["warm"]["error"]
    client.state = "restarting"
    assert error(await http.post(f"{SETS}/s/warm"))[:2] == (503, "engine_not_ready")


async def test_too_many_examples_are_refused_before_their_media_are_read(
    http: httpx.AsyncClient, settings: Settings
) -> None:
    limit = settings.max_set_examples
    response = await http.post(
        SETS, json={"examples": [{"text": "x"}] * limit + [{"media": [{"type": "image_id", "image_id": "x"}]}]}
    )
    assert error(response) == (400, "too_many_examples", "examples")


async def test_the_event_loop_is_free_while_thousands_of_examples_are_built_and_their_body_is_hashed(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[int]] = {"build": set(), "hash": set()}

    def record(step: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        threads[step].add(threading.get_ident())
        return function(*arguments, **keywords)

    monkeypatch.setattr(api_examples, "NewExample", partial(record, "build", NewExample))
    monkeypatch.setattr(support_sets, "IdempotencyKey", partial(record, "hash", IdempotencyKey))
    body = {"examples": [{"text": "t"}] * 20}
    response = await http.post(SETS, json=body, headers={"Idempotency-Key": "key"})
    assert response.status_code == 200, response.text
    assert all(used and threading.get_ident() not in used for used in threads.values())


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "Infinity"])
async def test_metadata_hold_finite_numbers(http: httpx.AsyncClient, number: str) -> None:
    """PostgreSQL has no JSON with others."""
    body = f'{{"examples": [{{"text": "a"}}], "metadata": {{"x": [{number}]}}}}'
    response = await http.post("/v1/support_sets", content=body.encode(), headers=AS_JSON)
    assert response.status_code == 400
