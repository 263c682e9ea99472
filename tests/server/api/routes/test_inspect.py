"""POST /v1/inspect: the inspected token, and the shape of the response."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import image_part
from tests.server.fakes import CONFIG, TOKENIZER, FakeClient

pytestmark = pytest.mark.anyio
PROMPT = [{"type": "text", "text": "x"}, image_part(), {"type": "text", "text": "A"}]
IMAGE = TOKENIZER.media_token_id


async def inspect(http: httpx.AsyncClient, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = await http.post("/v1/inspect", json={"prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def test_the_default_token_is_the_last_of_the_answer(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await inspect(http, PROMPT, answer=" cat", request_id="me")
    (request,) = client.inspections
    answer = TOKENIZER.encode_plain(" cat")
    assert request.prompt.token_ids == [*TOKENIZER.encode_plain("x"), IMAGE, *TOKENIZER.encode_plain("A"), *answer]
    assert request.prompt.media_index == [-1, 0, 0, 0, 0, 0, 0]
    assert (request.token, request.layers) == (6, [])
    assert (body["id"], body["object"], body["model"]) == ("inspect-me", "inspection", "tiny")
    assert (body["token"], body["num_prompt_tokens"]) == (6, 3)
    assert [token["media"] for token in body["tokens"]] == [None, 0, 0, 0, 0, 0, 0]
    assert [token["id"] for token in body["tokens"]] == request.prompt.token_ids
    assert [token["text"] for token in body["tokens"]] == ["x", "<image>", *"A cat"]
    assert list(client.media[0]) == request.prompt.media


async def test_without_layers_one_map_covers_all_layers(http: httpx.AsyncClient) -> None:
    body = await inspect(http, PROMPT)
    assert body["gates"] == [{"layer": layer, "attention": 0.5, "feed_forward": -0.25} for layer in CONFIG.gated_layers]
    assert body["attention"] == [
        {
            "layers": list(CONFIG.gated_layers),
            "visual_tokens": [1.0, 0.0, 0.0, 0.0],
            "grid": [[[1.0, 0.0], [0.0, 0.0]]],
        }
    ]


async def test_each_requested_layer_has_a_map(http: httpx.AsyncClient, client: FakeClient) -> None:
    layers = list(CONFIG.gated_layers)
    body = await inspect(http, PROMPT, token=1, layers=[layers[1], layers[0], layers[1]])
    assert client.inspections[0].layers == [layers[1], layers[0]]
    assert [item["layers"] for item in body["attention"]] == [[layers[1]], [layers[0]]]
    assert body["token"] == 1


async def test_a_token_without_media_has_no_map(http: httpx.AsyncClient, client: FakeClient) -> None:
    assert (await inspect(http, PROMPT, token=0))["attention"] == []
    assert (await inspect(http, "text alone"))["attention"] == []
    body = await inspect(http, [5, 6], answer="ab")
    assert [token["id"] for token in body["tokens"]] == [5, 6, *TOKENIZER.encode_plain("ab")]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": "x", "token": 1}, 400, "token"),
        ({"prompt": "x", "token": -1}, 400, "token"),
        ({"prompt": "x", "layers": [1, 0]}, 400, "layers[1]"),
        ({"prompt": "x" * 60, "answer": "y" * 9}, 400, "answer"),
        ({"prompt": "x" * 65}, 400, "prompt"),
        ({"prompt": "x", "heads": [1]}, 422, "heads"),
        ({"prompt": "x", "model": "other"}, 404, "model"),
    ],
)
async def test_an_error_names_the_invalid_field(
    http: httpx.AsyncClient, client: FakeClient, fields: dict[str, Any], status: int, param: str | None
) -> None:
    response = await http.post("/v1/inspect", json=fields)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
    assert client.inspections == []
