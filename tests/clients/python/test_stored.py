"""Tests of the calls other than completions, of both clients with a fake server: requests and parsed replies."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from flamboyance_client import (
    AsyncClient,
    Client,
    Conflict,
    Evaluation,
    EvaluationFailed,
    Recommendation,
    Unavailable,
    UnexpectedReply,
    async_resources,
    example,
    image,
    query,
    resources,
)
from flamboyance_client.stored import SupportSetCalls

PNG = b"\x89PNG\r\n\x1a\n..."
SET = {"id": "ss_1", "name": "pets", "version": 2, "num_examples": 3, "status": "ready"}
COMPLETION = {
    "id": "cmpl-1",
    "model": "tiny",
    "choices": [{"index": 0, "text": "cat"}],
    "fewshot": {"shots": [{"id": "a"}]},
}
CLASSIFICATION = {
    "label": "cat",
    "confidence": 0.75,
    "candidates": [
        {"label": "cat", "probability": 0.75, "logprob": -1.0},
        {"label": "dog", "probability": 0.25, "logprob": -2.0},
    ],
}
MEDIA = {"id": "img_1", "object": "image", "bytes": 9, "width": 2, "height": 1, "frames": 1}
ROW = {"strategy": "random", "k": 4, "accuracy": 0.75, "accuracy_interval": [0.5, 0.875], "queries": 8}
RECOMMENDED = {"examples": {"k": 4}, "method": "in_context"}
RECOMMENDATION = {
    "request": RECOMMENDED,
    "accuracy": 0.75,
    "accuracy_interval": [0.5, 0.875],
    "reason": "random is best",
}
EVALUATION = {
    "id": "ev_1",
    "status": "completed",
    "cells": [{"k": 4}],
    "summary": [ROW],
    "baseline": {"label": "cat", "accuracy": 0.25},
    "recommendation": RECOMMENDATION,
}
SCORES = {"data": [{"logprob": -1.5, "tokens": ["a"], "token_logprobs": [-1.5]}]}
DELETED = {"id": "x", "deleted": True}


def page(item: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [item], "has_more": True, "last_id": item["id"]}


Send = Callable[[Any], Any]
CASES: list[tuple[Send, str, str, Any, dict[str, Any]]] = [
    (
        lambda c: c.fewshot.complete(query("img_1"), shots=[example("img_2", "cat")], max_tokens=2, seed=None),
        "POST",
        "/v1/fewshot/completions",
        {"query": {"image": "img_1"}, "shots": [{"image": "img_2", "answer": "cat"}], "max_tokens": 2},
        COMPLETION,
    ),
    (
        lambda c: c.classify(query(question="Which?"), candidates=["cat", "dog"]),
        "POST",
        "/v1/classify",
        {"query": {"question": "Which?"}, "candidates": ["cat", "dog"]},
        CLASSIFICATION,
    ),
    (
        lambda c: c.classify("img_1", examples=Recommendation.parse(RECOMMENDATION)),
        "POST",
        "/v1/classify",
        {"query": {"image": "img_1"}, "examples": {"k": 4}, "method": "in_context"},
        CLASSIFICATION,
    ),
    (
        lambda c: c.fewshot.complete("img_1", examples=Recommendation.parse(RECOMMENDATION)),
        "POST",
        "/v1/fewshot/completions",
        {"query": {"image": "img_1"}, "examples": {"k": 4}},
        COMPLETION,
    ),
    (
        lambda c: c.classify("img_1", examples=RECOMMENDED["examples"]),
        "POST",
        "/v1/classify",
        {"query": {"image": "img_1"}, "examples": {"k": 4}},
        CLASSIFICATION,
    ),
    (lambda c: c.score("a", ["b", [1]]), "POST", "/v1/score", {"prompt": "a", "candidates": ["b", [1]]}, SCORES),
    (lambda c: c.embed(["a"]), "POST", "/v1/embeddings", {"input": ["a"]}, {"data": [{"embedding": [1.0]}]}),
    (
        lambda c: c.embed([image("https://a/b.png")], media_vector="likeness"),
        "POST",
        "/v1/embeddings",
        {"input": [image("https://a/b.png")], "media_vector": "likeness"},
        {"data": [{"embedding": [1.0]}]},
    ),
    (lambda c: c.inspect("a", token=0), "POST", "/v1/inspect", {"prompt": "a", "token": 0}, {"layers": []}),
    (lambda c: c.images.upload(PNG), "POST", "/v1/images", PNG, MEDIA),
    (
        lambda c: c.images.upload("https://host/cat.png"),
        "POST",
        "/v1/images",
        {"url": "https://host/cat.png"},
        MEDIA,
    ),
    (lambda c: c.images.get("img_1"), "GET", "/v1/images/img_1", None, MEDIA),
    (lambda c: c.images.list(limit=1), "GET", "/v1/images?limit=1", None, page(MEDIA)),
    (lambda c: c.images.delete("img_1"), "DELETE", "/v1/images/img_1", None, DELETED),
    (lambda c: c.support_sets.create(name="pets"), "POST", "/v1/support_sets", {"name": "pets"}, SET),
    (lambda c: c.support_sets.get("pets", version=1), "GET", "/v1/support_sets/pets?version=1", None, SET),
    (lambda c: c.support_sets.list(), "GET", "/v1/support_sets?limit=100", None, page(SET)),
    (
        lambda c: c.support_sets.update("pets", name="animals", ttl_seconds=None),
        "PATCH",
        "/v1/support_sets/pets",
        {"name": "animals", "ttl_seconds": None},
        SET,
    ),
    (lambda c: c.support_sets.delete("a/b"), "DELETE", "/v1/support_sets/a%2Fb", None, DELETED),
    (
        lambda c: c.support_sets.put("pets", [example("img_1", label="cat", id="a")], expected_version=1),
        "POST",
        "/v1/support_sets/pets/examples",
        {"examples": [{"image": "img_1", "label": "cat", "id": "a"}], "expected_version": 1},
        SET,
    ),
    (
        lambda c: c.support_sets.remove("pets", ["a", "b"]),
        "DELETE",
        "/v1/support_sets/pets/examples?id=a%2Cb",
        None,
        SET,
    ),
    (
        lambda c: c.support_sets.examples("pets", after="a"),
        "GET",
        "/v1/support_sets/pets/examples?limit=100&after=a",
        None,
        page({"id": "b", "label": "cat"}),
    ),
    (
        lambda c: c.support_sets.search("pets", query("img_1"), k=2),
        "POST",
        "/v1/support_sets/pets/search",
        {"query": {"image": "img_1"}, "k": 2},
        {"data": [{"id": "b", "score": 0.5}]},
    ),
    (
        lambda c: c.support_sets.warm("pets", wait=True),
        "POST",
        "/v1/support_sets/pets/warm",
        {"wait": True},
        SET,
    ),
    (lambda c: c.evaluations.get("ev_1"), "GET", "/v1/evaluations/ev_1", None, EVALUATION),
    (
        lambda c: c.evaluations.list(support_set="ss_1"),
        "GET",
        "/v1/evaluations?support_set=ss_1&limit=100",
        None,
        page(EVALUATION),
    ),
    (lambda c: c.evaluations.cancel("ev_1"), "POST", "/v1/evaluations/ev_1/cancel", None, EVALUATION),
    (lambda c: c.evaluations.delete("ev_1"), "DELETE", "/v1/evaluations/ev_1", None, DELETED),
]


def exchange(send: Send, reply: Any, status: int = 200) -> tuple[httpx.Request, Any]:
    """Return the request and the parsed reply, after checks that both clients agree."""
    requests: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(status, json=reply)

    with Client("http://server", transport=httpx.MockTransport(handle)) as client:
        reply_of_sync = send(client)

    async def run_async() -> Any:
        async with AsyncClient("http://server", transport=httpx.MockTransport(handle)) as client:
            return await send(client)

    assert asyncio.run(run_async()) == reply_of_sync
    first, second = requests
    assert (first.method, first.url, first.content) == (second.method, second.url, second.content)
    return first, reply_of_sync


@pytest.mark.parametrize(("send", "method", "path", "body", "reply"), CASES, ids=[f"{c[1]} {c[2]}" for c in CASES])
def test_a_call_has_the_documented_method_path_and_body(
    send: Send, method: str, path: str, body: Any, reply: dict[str, Any]
) -> None:
    request, _ = exchange(send, reply)
    assert (request.method, request.url.raw_path.decode()) == (method, path)
    if isinstance(body, bytes):
        assert (request.content, request.headers["content-type"]) == (body, "image/png")
    else:
        assert (json.loads(request.content) if request.content else None) == body


def test_a_new_evaluation_is_accepted_and_not_over() -> None:
    request, evaluation = exchange(
        lambda c: c.support_sets.evaluate("pets", k=[0, 4]), {"id": "ev_1", "status": "queued"}, 202
    )
    assert request.url.path == "/v1/support_sets/pets/evaluate"
    assert not evaluation.is_over


def test_one_value_of_an_evaluation_is_the_same_as_a_list_of_it() -> None:
    call = SupportSetCalls().evaluate("pets", {"k": 4, "methods": "knn", "seeds": [1, 2], "shots_attend": "alone"})
    assert call.body == {"k": [4], "methods": ["knn"], "seeds": [1, 2], "shots_attend": "alone"}


PROGRESS = {"queries": 4, "queries_done": 1}


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_an_evaluation_is_waited_for(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    for module in (resources, async_resources):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    states = [{**EVALUATION, "status": state, "progress": PROGRESS} for state in ("running", "running", status)]

    def client() -> tuple[httpx.MockTransport, list[dict[str, Any]]]:
        remaining = list(states)

        def handle(request: httpx.Request) -> httpx.Response:
            if request.method == "POST":
                return httpx.Response(202, json={"id": "ev_1", "status": "queued"})
            return httpx.Response(200, json=remaining.pop(0))

        return httpx.MockTransport(handle), remaining

    async def wait(transport: httpx.MockTransport) -> Evaluation:
        async with AsyncClient("http://server", transport=transport) as asynchronous:
            return await asynchronous.support_sets.evaluate("pets", wait=True)

    def wait_blocking(transport: httpx.MockTransport) -> Evaluation:
        with Client("http://server", transport=transport) as blocking:
            return blocking.support_sets.evaluate("pets", wait=True)

    for run in (wait_blocking, lambda transport: asyncio.run(wait(transport))):
        transport, remaining = client()
        if status == "completed":
            assert run(transport).raw["recommendation"] == RECOMMENDATION
        else:
            with pytest.raises(EvaluationFailed, match=status):
                run(transport)
        assert not remaining


def taken(code: str) -> Callable[[httpx.Request], httpx.Response]:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(409, json={"error": {"message": "no", "code": code}})
        return httpx.Response(200, json=SET)

    return handle


def test_only_a_name_that_is_taken_may_exist() -> None:
    with Client("http://server", transport=httpx.MockTransport(taken("name_taken"))) as client:
        assert client.support_sets.create(name="pets", exist_ok=True).version == 2
        with pytest.raises(Conflict):
            client.support_sets.create(name="pets")
    transport = httpx.MockTransport(taken("idempotency_conflict"))
    with Client("http://server", transport=transport) as client, pytest.raises(Conflict):
        client.support_sets.create(name="pets", exist_ok=True)


def keys_of_attempts(send: Send) -> list[str | None]:
    """Return the idempotency keys of all attempts to send a call, each refused with a 503."""
    keys: list[str | None] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers.get("idempotency-key"))
        return httpx.Response(503, headers={"retry-after": "0"})

    with Client("http://server", transport=httpx.MockTransport(refuse)) as client, pytest.raises(Unavailable):
        send(client)
    return keys


@pytest.mark.parametrize(
    "send",
    [lambda c: c.support_sets.create(name="pets"), lambda c: c.support_sets.put("pets", [example("img_1")])],
    ids=["create", "put"],
)
def test_a_retried_creation_has_the_key_of_the_first_attempt(send: Send) -> None:
    first, *retries = keys_of_attempts(send)
    assert first
    assert retries == [first, first]
    assert keys_of_attempts(send)[0] != first


def test_an_evaluation_that_may_have_started_is_not_started_again() -> None:
    assert keys_of_attempts(lambda c: c.support_sets.evaluate("pets")) == [None]
    assert len(keys_of_attempts(lambda c: c.support_sets.get("pets"))) == 3


def test_replies_are_parsed() -> None:
    assert exchange(lambda c: c.classify(query()), CLASSIFICATION)[1].probabilities == {"cat": 0.75, "dog": 0.25}
    assert exchange(lambda c: c.fewshot.complete(query()), COMPLETION)[1].fewshot == {"shots": [{"id": "a"}]}
    media = exchange(lambda c: c.images.upload(PNG), MEDIA)[1]
    assert (media.id, media.bytes, media.width) == ("img_1", 9, 2)
    (result,) = exchange(lambda c: c.support_sets.search("pets", query()), {"data": [{"id": "b", "score": 0.5}]})[1]
    assert (result.id, result.score) == ("b", 0.5)
    created = exchange(lambda c: c.support_sets.create(examples=[{"text": "a"}]), {**SET, "example_ids": ["ex_1"]})[1]
    assert created.example_ids == ("ex_1",)
    sets = exchange(lambda c: c.support_sets.list(), page(SET))[1]
    assert ([item.name for item in sets], sets.has_more, sets.last_id, len(sets)) == (["pets"], True, "ss_1", 1)
    evaluation = exchange(lambda c: c.evaluations.get("ev_1"), EVALUATION)[1]
    assert evaluation.is_over
    assert evaluation.recommendation.examples == {"k": 4}
    assert (evaluation.recommendation.accuracy_interval, evaluation.recommendation.reason) == (
        (0.5, 0.875),
        "random is best",
    )
    (row,) = evaluation.summary
    assert (row.name, row.shots_attend, row.median_seconds) == ("in_context, random", None, None)
    form = {"shots_attend": "alone", "latency": {"queries": 8, "median_seconds": 0.25, "p90_seconds": 0.5}}
    (alone,) = exchange(lambda c: c.evaluations.get("ev_1"), EVALUATION | {"summary": [ROW | form]})[1].summary
    assert (alone.name, alone.shots_attend, alone.median_seconds) == ("in_context, random, shots alone", "alone", 0.25)
    assert (row.strategy, row.k, row.accuracy, row.accuracy_interval) == ("random", 4, 0.75, (0.5, 0.875))
    assert (row.lowest_accuracy, row.highest_accuracy, row.queries) == (0.75, 0.75, 8)
    assert (evaluation.baseline.label, evaluation.baseline.accuracy) == ("cat", 0.25)
    assert exchange(lambda c: c.images.delete("img_1"), DELETED)[1] is True
    assert exchange(lambda c: c.embed("a"), {"data": [{"embedding": [1.0, 0.5]}]})[1] == ((1.0, 0.5),)
    assert exchange(lambda c: c.score("a", ["b"]), SCORES)[1][0].token_logprobs == (-1.5,)


def test_the_default_model_is_sent_with_every_request_that_has_a_model() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content)["model"] == "tiny"
        return httpx.Response(200, json={**CLASSIFICATION, **COMPLETION, **SCORES})

    with Client("http://server", model="tiny", transport=httpx.MockTransport(handle)) as client:
        client.classify(query())
        client.fewshot.complete(query())
        client.score("a", ["b"])


def test_an_unknown_option_raises_before_sending() -> None:
    with Client("http://nowhere") as client:
        for send in (client.classify, client.fewshot.complete):
            with pytest.raises(TypeError, match="unknown option colour"):
                send(query(), colour="red")  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="unknown option colour"):
            client.support_sets.update("pets", colour="red")  # type: ignore[call-arg]


def test_a_malformed_reply_raises() -> None:
    with pytest.raises(UnexpectedReply):
        exchange(lambda c: c.classify(query()), {"label": 3})


def test_both_clients_have_the_same_methods() -> None:
    for kind in ("FewShot", "Images", "SupportSets", "Evaluations"):
        sync_kind, async_kind = getattr(resources, kind), getattr(async_resources, f"Async{kind}")
        methods = {name for name in vars(sync_kind) if not name.startswith("_")}
        assert methods == {name for name in vars(async_kind) if not name.startswith("_")}
        for name in methods:
            sync_signature = inspect.signature(getattr(sync_kind, name))
            assert sync_signature.parameters == inspect.signature(getattr(async_kind, name)).parameters


def test_a_few_shot_completion_streams() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content)["stream"] is True
        return httpx.Response(200, text=f"data: {json.dumps(COMPLETION)}\n\ndata: [DONE]\n\n")

    with Client("http://server", transport=httpx.MockTransport(handle)) as client:
        opened: AbstractContextManager[Any] = client.fewshot.stream(query("img_1"))
        with opened as events:
            assert [event.text for event in events] == ["cat"]
