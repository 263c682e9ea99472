"""POST /v1/score: continuations of a raw prompt, as text or as token ids."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import image_part
from tests.server.fakes import TOKENIZER, FakeClient, fake_logprobs

pytestmark = pytest.mark.anyio


async def score(http: httpx.AsyncClient, prompt: Any, candidates: list[Any], **fields: Any) -> dict[str, Any]:
    response = await http.post("/v1/score", json={"prompt": prompt, "candidates": candidates, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def test_every_token_of_a_candidate_is_scored(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await score(http, [image_part(), {"type": "text", "text": "a"}], [" cat", "nt"])
    (request,) = client.scores
    assert (body["object"], body["model"]) == ("score", "tiny")
    assert [TOKENIZER.decode(item["token_ids"]) for item in body["data"]] == [" cat", "nt"]
    for item in body["data"]:
        assert item["token_logprobs"] == fake_logprobs(request, item["token_ids"])
        assert item["logprob"] == pytest.approx(sum(item["token_logprobs"]))
        assert item["num_tokens"] == len(item["tokens"])
    assert [item["tokens"] for item in body["data"]] == [list(" cat"), list("nt")]
    assert body["usage"]["prompt_tokens"] == len(request.prompt.token_ids) == 2
    assert body["usage"]["fewshot_details"]["media"] == 1


async def test_prompt_and_candidates_may_be_token_ids(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await score(http, [5, 6], [[1, 2, 3], "a"])
    assert client.scores[0].prompt.token_ids == [5, 6]
    assert [item["token_ids"] for item in body["data"]] == [[1, 2, 3], TOKENIZER.encode_plain("a")]


async def test_a_prompt_may_be_text(http: httpx.AsyncClient, client: FakeClient) -> None:
    await score(http, "two and", [" two"], priority=3)
    assert TOKENIZER.decode(client.scores[0].prompt.token_ids) == "two and"
    assert client.scores[0].priority == 3


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"candidates": []}, 400, "candidates"),
        ({"candidates": [[]]}, 400, "candidates[0]"),
        ({"candidates": [""]}, 400, "candidates[0]"),
        ({"candidates": [[9999]]}, 400, "candidates[0][0]"),
        ({"candidates": [[TOKENIZER.media_token_id]]}, 400, "candidates[0]"),
        ({"candidates": ["x" * 70]}, 400, "candidates[0]"),
        ({"prompt": "x" * 70}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"max_tokens": 1}, 422, "max_tokens"),
    ],
)
async def test_an_error_names_the_invalid_field(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str
) -> None:
    response = await http.post("/v1/score", json={"prompt": "a", "candidates": ["b"], **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
