"""Tests of one item in place of a list, of both clients: it is taken as one item, or refused before anything is sent."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from flamboyance_client import Client, SupportSet, example, image
from flamboyance_client.api import Api
from flamboyance_client.batches import checked_queries
from flamboyance_client.curation import checked_pool
from flamboyance_client.stored import SupportSetCalls
from tests.clients.python.test_stored import SET, Send, exchange

PICTURE = np.zeros((4, 5, 3), np.uint8)
PART = image(PICTURE)
EXAMPLE = example("img_1", label="cat")


def test_a_text_is_one_id() -> None:
    request, _ = exchange(lambda c: c.support_sets.remove("pets", "12"), SET)
    assert (request.method, request.url.query) == ("DELETE", b"id=12")


def test_several_ids_in_a_text_are_refused() -> None:
    with Client("http://nowhere") as client, pytest.raises(ValueError, match="'a,b' is not the id of an example"):
        client.support_sets.remove("pets", "a,b")


@pytest.mark.parametrize(
    ("send", "expected"),
    [
        (lambda c: c.complete(PART), "a prompt is a text, token ids or a list of parts, such as .*, not one dict"),
        (lambda c: c.complete(b"This is a"), "a prompt is a text, .* not one bytes"),
        (lambda c: c.complete(PICTURE), "a prompt is a text, .* not one ndarray"),
        (lambda c: c.inspect(PART), "a prompt is a text, .* not one dict"),
        (lambda c: c.score("This is a", "cat"), r"candidates must be a list .* such as \["),
        (lambda c: c.embed(PART), "the input must be a text or a list of texts or parts, .* not one dict"),
        (lambda c: c.embed(b"GIF89a"), "the input must be a text or a list .* not one bytes"),
        (lambda c: c.classify("img_1", shots=EXAMPLE), "shots must be a list, such as"),
        (lambda c: c.classify_many(PICTURE, examples="pets"), r"queries must be a list, which media_files\(folder\)"),
        (lambda c: c.support_sets.suggest("pets", PICTURE), "a pool must be a list"),
        (lambda c: c.support_sets.put("pets", EXAMPLE), "examples must be a list, such as"),
        (lambda c: c.support_sets.create(examples=EXAMPLE), "examples must be a list, such as"),
        (lambda c: c.support_sets.get(SupportSet.parse(SET)), "a name or an id, such as support_set.id, not a Supp"),
        (lambda c: c.support_sets.export(SupportSet.parse(SET), "."), "such as support_set.id, not a SupportSet"),
    ],
)
def test_one_item_in_place_of_a_list_is_refused(send: Send, expected: str) -> None:
    with Client("http://nowhere") as client, pytest.raises(TypeError, match=expected):
        send(client)


@pytest.mark.parametrize("single", ["a.png", b"GIF89a", PICTURE, PICTURE[:, :, 0], Image.new("L", (2, 2)), PART])
def test_one_image_is_not_many(single: Any) -> None:
    with pytest.raises(TypeError, match="queries must be a list"):
        checked_queries(single, 1)
    with pytest.raises(TypeError, match="a pool must be a list"):
        checked_pool(single)


def test_a_misspelled_choice_of_what_errors_do_is_refused() -> None:
    with (
        Client("http://nowhere") as client,
        pytest.raises(ValueError, match="on_error must be 'raise' or 'return', not"),
    ):
        client.classify_many([b"a"], on_error="ignore")  # type: ignore[call-overload]


def test_an_array_may_be_a_list() -> None:
    assert len(checked_queries(np.zeros((3, 4, 5, 3), np.uint8), 1)) == 3
    assert checked_queries(np.array(["a.png", "b.png"]), 1) == ["a.png", "b.png"]
    assert checked_queries((name for name in ("a.png", "b.png")), 1) == ["a.png", "b.png"]


def test_an_iterator_is_read_once_for_all_requests() -> None:
    requests: list[httpx.Request] = []
    once: Any = iter

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json={"label": "cat", "confidence": 1.0, "candidates": []})

    with Client("http://server", transport=httpx.MockTransport(answer)) as client:
        shots = [{"image": "img_1", "label": label} for label in ("cat", "dog")]
        client.classify_many(["img_2", "img_3"], shots=once(shots), candidates=once(["cat", "dog"]))
        client.measure([("img_2", "cat")], methods=["knn", "linear"], shots=once(shots))
    sent = [json.loads(request.content) for request in requests]
    assert [body["shots"] for body in sent] == [shots] * 4
    assert [body["candidates"] for body in sent[:2]] == [["cat", "dog"]] * 2
    request, _ = exchange(lambda c: c.support_sets.remove("pets", once(["1", "2"])), SET)
    assert request.url.query == b"id=1%2C2"


def test_lists_are_taken_as_they_are() -> None:
    assert Api().embed("a", {}).body == {"input": ["a"]}
    assert Api().score("a", ("cat", [1]), {}).body == {"prompt": "a", "candidates": ["cat", [1]]}
    assert SupportSetCalls().put("pets", (EXAMPLE,), None).body == {"examples": [EXAMPLE]}
