"""Both clients' calls beside completions, against one imagined server: what is sent, and how replies are read."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from flamboyance_client import AsyncClient, Client, UnexpectedReply, example, query
from flamboyance_client import async_resources as awaited
from flamboyance_client import resources as waiting

PNG = b"\x89PNG\r\n\x1a\n..."
SET = {"id": "ss_1", "name": "pets", "version": 2, "num_examples": 3, "status": "ready"}
COMPLETION = {
    "id": "cmpl-1",
    "model": "tiny",
    "choices": [{"index": 0, "text": "cat"}],
    "fewshot": {"shots": [{"id": "a"}]},
}
CLASSES = {
    "label": "cat",
    "confidence": 0.75,
    "candidates": [
        {"label": "cat", "probability": 0.75, "logprob": -1.0},
        {"label": "dog", "probability": 0.25, "logprob": -2.0},
    ],
}
MEDIA = {"id": "img_1", "object": "image", "bytes": 9, "width": 2, "height": 1, "frames": 1}
EVALUATION = {"id": "ev_1", "status": "completed", "cells": [{"k": 4}], "recommendation": {"examples": {"k": 4}}}
SCORES = {"data": [{"logprob": -1.5, "tokens": ["a"], "token_logprobs": [-1.5]}]}
GONE = {"id": "x", "deleted": True}


def page(item: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [item], "has_more": True, "last_id": item["id"]}


Ask = Callable[[Any], Any]
CASES: list[tuple[Ask, str, str, Any, dict[str, Any]]] = [
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
        CLASSES,
    ),
    (lambda c: c.score("a", ["b", [1]]), "POST", "/v1/score", {"prompt": "a", "candidates": ["b", [1]]}, SCORES),
    (lambda c: c.embed(["a"]), "POST", "/v1/embeddings", {"input": ["a"]}, {"data": [{"embedding": [1.0]}]}),
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
    (lambda c: c.images.delete("img_1"), "DELETE", "/v1/images/img_1", None, GONE),
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
    (lambda c: c.support_sets.delete("a/b"), "DELETE", "/v1/support_sets/a%2Fb", None, GONE),
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
    (lambda c: c.evaluations.delete("ev_1"), "DELETE", "/v1/evaluations/ev_1", None, GONE),
]


def sent(ask: Ask, reply: Any, status: int = 200) -> tuple[httpx.Request, Any]:
    """The request and what was made of the reply, the same for both clients."""
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(status, json=reply)

    with Client("http://server", transport=httpx.MockTransport(handle)) as client:
        first = ask(client)

    async def again() -> Any:
        async with AsyncClient("http://server", transport=httpx.MockTransport(handle)) as client:
            return await ask(client)

    assert asyncio.run(again()) == first
    one, other = seen
    assert (one.method, one.url, one.content) == (other.method, other.url, other.content)
    return one, first


@pytest.mark.parametrize(("ask", "method", "path", "body", "reply"), CASES, ids=[f"{c[1]} {c[2]}" for c in CASES])
def test_a_call_is_sent_as_the_server_reads_it(
    ask: Ask, method: str, path: str, body: Any, reply: dict[str, Any]
) -> None:
    request, _ = sent(ask, reply)
    assert (request.method, request.url.raw_path.decode()) == (method, path)
    if isinstance(body, bytes):
        assert (request.content, request.headers["content-type"]) == (body, "image/png")
    else:
        assert (json.loads(request.content) if request.content else None) == body


def test_an_evaluation_is_accepted_and_not_done() -> None:
    request, evaluation = sent(
        lambda c: c.support_sets.evaluate("pets", k=[0, 4]), {"id": "ev_1", "status": "queued"}, 202
    )
    assert request.url.path == "/v1/support_sets/pets/evaluate"
    assert not evaluation.is_over


def test_replies_are_data() -> None:
    assert sent(lambda c: c.classify(query()), CLASSES)[1].probabilities == {"cat": 0.75, "dog": 0.25}
    assert sent(lambda c: c.fewshot.complete(query()), COMPLETION)[1].fewshot == {"shots": [{"id": "a"}]}
    media = sent(lambda c: c.images.upload(PNG), MEDIA)[1]
    assert (media.id, media.bytes, media.width) == ("img_1", 9, 2)
    (found,) = sent(lambda c: c.support_sets.search("pets", query()), {"data": [{"id": "b", "score": 0.5}]})[1]
    assert (found.id, found.score) == ("b", 0.5)
    made = sent(lambda c: c.support_sets.create(examples=[{"text": "a"}]), {**SET, "example_ids": ["ex_1"]})[1]
    assert made.example_ids == ("ex_1",)
    sets = sent(lambda c: c.support_sets.list(), page(SET))[1]
    assert ([one.name for one in sets], sets.has_more, sets.last_id, len(sets)) == (["pets"], True, "ss_1", 1)
    evaluation = sent(lambda c: c.evaluations.get("ev_1"), EVALUATION)[1]
    assert evaluation.is_over
    assert evaluation.recommendation == {"examples": {"k": 4}}
    assert sent(lambda c: c.images.delete("img_1"), GONE)[1] is True
    assert sent(lambda c: c.embed("a"), {"data": [{"embedding": [1.0, 0.5]}]})[1] == ((1.0, 0.5),)
    assert sent(lambda c: c.score("a", ["b"]), SCORES)[1][0].token_logprobs == (-1.5,)


def test_the_model_is_named_in_every_request_that_has_one() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content)["model"] == "tiny"
        return httpx.Response(200, json={**CLASSES, **COMPLETION, **SCORES})

    with Client("http://server", model="tiny", transport=httpx.MockTransport(handle)) as client:
        client.classify(query())
        client.fewshot.complete(query())
        client.score("a", ["b"])


def test_an_unknown_option_is_a_type_error_before_anything_is_sent() -> None:
    with Client("http://nowhere") as client:
        for ask in (client.classify, client.fewshot.complete):
            with pytest.raises(TypeError, match="unknown option colour"):
                ask(query(), colour="red")  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="unknown option colour"):
            client.support_sets.update("pets", colour="red")  # type: ignore[call-arg]


def test_a_reply_of_another_shape_is_unexpected() -> None:
    with pytest.raises(UnexpectedReply):
        sent(lambda c: c.classify(query()), {"label": 3})


def test_both_clients_have_the_same_methods() -> None:
    for kind in ("FewShot", "Images", "SupportSets", "Evaluations"):
        ours, theirs = getattr(waiting, kind), getattr(awaited, f"Async{kind}")
        methods = {name for name in vars(ours) if not name.startswith("_")}
        assert methods == {name for name in vars(theirs) if not name.startswith("_")}
        for name in methods:
            assert (
                inspect.signature(getattr(ours, name)).parameters == inspect.signature(getattr(theirs, name)).parameters
            )


def test_a_few_shot_stream_is_read_piece_by_piece() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content)["stream"] is True
        return httpx.Response(200, text=f"data: {json.dumps(COMPLETION)}\n\ndata: [DONE]\n\n")

    with Client("http://server", transport=httpx.MockTransport(handle)) as client:
        opened: AbstractContextManager[Any] = client.fewshot.stream(query("img_1"))
        with opened as events:
            assert [event.text for event in events] == ["cat"]
