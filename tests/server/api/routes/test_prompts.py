"""Several prompts in one completion: their choices, their order, and what they share."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

import server.prompt
from model.prompt import PromptTokenizer
from server.errors import EngineFailed
from tests.server.api.routes.test_completions import complete, joined, post, stream, text_part
from tests.server.conftest import image_part, png
from tests.server.fakes import TOKENIZER, FakeClient

pytestmark = pytest.mark.anyio


async def test_each_of_several_prompts_has_its_choices(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await complete(http, prompt=["hello", "you"], n=2, echo=True)
    texts = ["helloa cat", "helloa cat", "youa cat", "youa cat"]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [*enumerate(texts)]
    assert body["usage"]["prompt_tokens"] == len("hello") + len("you")
    assert body["usage"]["completion_tokens"] == 4 * 6
    assert [request.sampling.n for request in client.requests] == [2, 2]
    assert len({request.request_id for request in client.requests}) == 2


async def test_several_prompts_may_be_token_ids_or_parts(http: httpx.AsyncClient, client: FakeClient) -> None:
    await complete(http, prompt=[[5, 6], [image_part(png("red")), text_part("a")], "b"])
    image, a, b = TOKENIZER.media_token_id, *TOKENIZER.encode_plain("ab")
    assert sorted(request.prompt.token_ids for request in client.requests) == sorted([[5, 6], [image, a], [b]])


async def test_several_prompts_are_one_stream(http: httpx.AsyncClient) -> None:
    chunks = await stream(http, prompt=["one", "two"], echo=True, stream_options={"include_usage": True})
    assert chunks.pop()["usage"]["completion_tokens"] == 12
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    for index, prompt in enumerate(["one", "two"]):
        answer = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert joined(answer) == prompt + "a cat"
        assert answer[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "most"),
    [({"n": 1}, 16), ({"n": 3}, 5), ({"n": 16}, 1), ({"n": 8, "use_beam_search": True, "best_of": 16}, 1)],
)
async def test_a_request_has_at_most_sixteen_answers_in_the_engine(
    http: httpx.AsyncClient, client: FakeClient, fields: dict[str, Any], most: int
) -> None:
    in_engine: list[int] = []

    async def count(index: int) -> None:
        await asyncio.sleep(0.002)
        in_engine.append(len(client.requests) - client.num_streams_ended)

    client.before = count
    body = await complete(http, prompt=["x"] * 40, **fields)
    assert [choice["text"] for choice in body["choices"]] == ["a cat"] * 40 * fields["n"]
    assert max(in_engine) == most


async def test_an_error_of_one_prompt_ends_the_request(http: httpx.AsyncClient, client: FakeClient) -> None:
    async def fail_third(index: int) -> None:
        await asyncio.sleep(0.002)
        if len(client.requests) >= 3:
            raise EngineFailed("gave up")

    client.before = fail_third
    response = await post(http, prompt=["x"] * 5)
    assert response.status_code == 500
    assert client.num_streams_ended == len(client.requests)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (["a", []], "prompt[1]"),
        ([[5], [6, 10**6]], "prompt[1][1]"),
        ([[5], [10**6] * 5000], "prompt[1]"),
        (["a", 3], "prompt[1]"),
        ([["a"]], "prompt[0]"),
        (["a", "data:image/png;base64,iVBO"], "prompt[1]"),
    ],
)
async def test_an_invalid_prompt_of_several_is_named(http: httpx.AsyncClient, prompt: Any, param: str) -> None:
    response = await post(http, prompt=prompt)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["param"] == param


async def test_the_limit_of_media_is_that_of_all_prompts_together(http: httpx.AsyncClient, app: FastAPI) -> None:
    limit = app.state.services.settings.max_media_per_request
    prompts = [[image_part(png("red"))] * limit, [image_part(png("red"))]]
    response = await post(http, prompt=prompts)
    assert response.status_code == 400
    assert f"{limit + 1} images" in response.json()["error"]["message"]


@pytest.mark.parametrize("form", [{}, {"json": None}, {"choice": ["a"], "regex": "a"}])
async def test_an_answer_has_exactly_one_form(http: httpx.AsyncClient, form: dict[str, Any]) -> None:
    response = await post(http, prompt="x", structured_outputs=form)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "structured_outputs needs exactly one of choice, regex and json"


async def test_several_prompts_are_refused_with_a_grammar_of_many_bytes(http: httpx.AsyncClient) -> None:
    form = {"json": {"enum": ["x" * 1000] * 100}}
    response = await post(http, prompt=["x"] * 200, structured_outputs=form)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "structured_outputs"


async def test_only_the_beginning_of_a_text_that_is_too_long_is_encoded(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.prompt, "CHARACTERS_PER_TOKEN", 4)
    limit = 64
    too_many = f"the prompt has {4 * limit} tokens, more than the model's limit of {limit}"
    for number, words in ((4 * limit, too_many), (5 * limit, "the text has more than")):
        error = (await post(http, prompt="a" * number)).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith(words)
    for path, field in (("inspect", {"answer": "a" * 5 * limit}), ("score", {"candidates": ["a" * 5 * limit]})):
        error = (await http.post(f"/v1/{path}", json={"prompt": "a", **field})).json()["error"]
        assert "the text has more than" in error["message"]


async def test_no_more_is_encoded_of_many_texts_than_of_one(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.prompt, "CHARACTERS_PER_TOKEN", 4)
    encoded, original = list[str](), PromptTokenizer.encode_plain

    def encode_plain(self: PromptTokenizer, text: str) -> list[int]:
        encoded.append(text)
        return original(self, text)

    monkeypatch.setattr(PromptTokenizer, "encode_plain", encode_plain)
    for parts in ([text_part("a" * 256)] * 3, [text_part("a" * 100)] * 7):
        error = (await post(http, prompt=parts)).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["message"] == "the text has more than 128 tokens, the model's limit is 64"
    assert [len(text) for text in encoded] == [256, 100, 100]
