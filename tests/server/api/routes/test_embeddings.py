"""POST /v1/embeddings has OpenAI's response shape, for texts and for media."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from server.errors import EngineDied
from tests.server.conftest import image_part, png
from tests.server.fakes import CONFIG, TOKENIZER, FakeClient, unit_vector

pytestmark = pytest.mark.anyio


async def embed(http: httpx.AsyncClient, inputs: Any, **fields: Any) -> dict[str, Any]:
    response = await http.post("/v1/embeddings", json={"input": inputs, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def text_vector(ids: list[int]) -> Any:
    return pytest.approx(unit_vector(repr(ids).encode(), CONFIG.language_model.dim).tolist())


def usage(prompt_tokens: int = 0, media: int = 0, media_deduplicated: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 0,
        "total_tokens": prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "fewshot_details": {"media": media, "media_deduplicated": media_deduplicated},
    }


async def test_a_text_has_an_embedding(http: httpx.AsyncClient, client: FakeClient) -> None:
    ids = TOKENIZER.encode_plain("a cat")
    body = await embed(http, "a cat", model="tiny", user="me")
    assert client.embedded_texts == [ids]
    assert body == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": text_vector(ids)}],
        "model": "tiny",
        "usage": usage(prompt_tokens=5),
    }


IDS = [TOKENIZER.encode_plain(text) for text in ("a", "<image>")]


@pytest.mark.parametrize(
    ("inputs", "ids"),
    [
        (["a", "<image>"], IDS),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "<image>"}], IDS),
        (IDS, IDS),
        (IDS[1], IDS[1:]),
        ([256], [[256]]),
    ],
)
async def test_inputs_may_be_several_texts_or_token_ids(
    http: httpx.AsyncClient, client: FakeClient, inputs: Any, ids: list[list[int]]
) -> None:
    body = await embed(http, inputs)
    assert client.embedded_texts == ids
    assert [item["index"] for item in body["data"]] == list(range(len(ids)))
    assert [item["embedding"] for item in body["data"]] == [text_vector(text_ids) for text_ids in ids]
    assert body["usage"]["total_tokens"] == sum(map(len, ids))


async def test_base64_encodes_the_same_numbers(http: httpx.AsyncClient) -> None:
    plain = await embed(http, ["a", "b"])
    packed = await embed(http, ["a", "b"], encoding_format="base64")
    for numbers, encoded in zip(plain["data"], packed["data"], strict=True):
        decoded = np.frombuffer(base64.b64decode(encoded["embedding"]), "<f4").tolist()
        assert decoded == pytest.approx(numbers["embedding"])


async def test_media_have_embeddings(http: httpx.AsyncClient, client: FakeClient) -> None:
    upload = await http.post("/v1/images", content=png("blue"), headers={"Content-Type": "image/png"})
    stored_id = upload.json()["id"]
    body = await embed(http, [image_part(), {"type": "image_id", "image_id": stored_id}, image_part()])
    red, blue, red_again = client.embedded
    assert (red.digest, blue.id) == (red_again.digest, stored_id)
    width = CONFIG.vision.feature_dim
    expected = [unit_vector(media.digest, width).tolist() for media in (red, blue, red)]
    assert [item["embedding"] for item in body["data"]] == [pytest.approx(vector) for vector in expected]
    assert body["usage"] == usage(media=3, media_deduplicated=1)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": "a", "dimensions": 4}, 422, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 422, "encoding_format"),
        ({"input": "a", "model": "other"}, 404, "model"),
        ({}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ["a", ""]}, 400, "input[1]"),
        ({"input": ["a", "data:video/mp4;base64,AAAA"]}, 400, "input[1]"),
        ({"input": ["a", 3]}, 400, "input[1]"),
        ({"input": [99999]}, 400, "input[0]"),
        ({"input": [[5], [5, 99999]]}, 400, "input[1][1]"),
        ({"input": "a" * 65}, 400, "input"),
        ({"input": ["a", "a" * 65]}, 400, "input[1]"),
        ({"input": [{"type": "text", "text": "a"}, image_part()]}, 400, "input[0]"),
        ({"input": [{"type": "end_of_chunk"}]}, 400, "input[0]"),
        ({"input": [image_part(b"no image")]}, 200, None),
        ({"input": [{"type": "audio", "audio": "x"}]}, 422, "input[0].type"),
        ({"input": [{"type": "image_id", "image_id": "img_" + "0" * 64}]}, 404, "input[0].image_id"),
        ({"input": [image_part()] * 4}, 400, "input"),
        ({"input": ["a"] * 2049}, 400, "input"),
    ],
)
async def test_an_error_names_the_invalid_input(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str | None
) -> None:
    response = await http.post("/v1/embeddings", json=fields)
    assert response.status_code == status, response.text
    if status != 200:
        assert response.json()["error"]["param"] == param


async def test_an_engine_failure_fails_only_its_request(
    http: httpx.AsyncClient, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(texts: Any) -> Any:
        raise EngineDied("died")

    with monkeypatch.context() as patched:
        patched.setattr(client, "embed_text", die)
        response = await http.post("/v1/embeddings", json={"input": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_died")
    await embed(http, "a")


async def test_metrics_count_embeddings(http: httpx.AsyncClient) -> None:
    await embed(http, "abc")
    text = (await http.get("/metrics")).text
    assert 'flamboyance:prompt_tokens_total{model_name="tiny"} 3.0' in text
    assert 'flamboyance:request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in text
    assert 'flamboyance:num_requests_running{model_name="tiny"} 0.0' in text
