"""/v1/score: continuations of a raw prompt, as text or as ids."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import image_part
from tests.server.fakes import TOKENIZER, FakeClient, fake_logprobs

pytestmark = pytest.mark.anyio


async def score(http: httpx.AsyncClient, prompt: Any, candidates: list[Any], **fields: Any) -> dict[str, Any]:
    answer = await http.post("/v1/score", json={"prompt": prompt, "candidates": candidates, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_every_token_of_a_candidate_is_scored(http: httpx.AsyncClient, client: FakeClient) -> None:
    found = await score(http, [image_part(), {"type": "text", "text": "a"}], [" cat", "nt"])
    (request,) = client.scores
    assert (found["object"], found["model"]) == ("score", "tiny")
    assert [TOKENIZER.decode(one["token_ids"]) for one in found["data"]] == [" cat", "nt"]
    for one in found["data"]:
        assert one["token_logprobs"] == fake_logprobs(request, one["token_ids"])
        assert one["logprob"] == pytest.approx(sum(one["token_logprobs"]))
        assert one["num_tokens"] == len(one["tokens"])
    assert found["usage"]["prompt_tokens"] == len(request.prompt.token_ids) == 2
    assert found["usage"]["fewshot_details"]["media"] == 1


async def test_ids_are_taken_as_they_are(http: httpx.AsyncClient, client: FakeClient) -> None:
    found = await score(http, [5, 6], [[1, 2, 3], "a"])
    assert client.scores[0].prompt.token_ids == [5, 6]
    assert [one["token_ids"] for one in found["data"]] == [[1, 2, 3], TOKENIZER.encode_plain("a")]


async def test_text_alone(http: httpx.AsyncClient, client: FakeClient) -> None:
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
async def test_a_wrong_field_is_refused_by_name(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str
) -> None:
    answer = await http.post("/v1/score", json={"prompt": "a", "candidates": ["b"], **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
