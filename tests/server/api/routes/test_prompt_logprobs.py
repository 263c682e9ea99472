"""Log-probabilities of prompts in completions: written once for all answers, and limited per request."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.api import generation
from tests.server.api.routes.test_completions import complete, events, post

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_that_repeat_the_prompt_have_the_same_log_probabilities_of_it(
    http: httpx.AsyncClient, stream: bool
) -> None:
    fields = {"echo": True, "logprobs": 2, "prompt_logprobs": 1, "max_tokens": 1}
    single = (await complete(http, prompt="ab", **fields))["choices"][0]
    if not stream:
        choices = (await complete(http, prompt="ab", n=3, temperature=1, **fields))["choices"]
        assert [choice["text"][:2] for choice in choices] == ["ab"] * 3
    else:
        chunks = events(await post(http, prompt="ab", n=3, temperature=1, stream=True, **fields))
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["text"] == "ab"]
    assert len(choices) == 3
    for choice in choices:
        assert choice["prompt_logprobs"] == single["prompt_logprobs"]
        for name, values in choice["logprobs"].items():
            assert values[:2] == single["logprobs"][name][:2]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True, "logprobs": 1, "prompt": "abcd", "n": 3}, "logprobs"),  # 4 x 2 x 3
        ({"prompt_logprobs": 0, "prompt": ["a" * 12, "b" * 9]}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "prompt": "abcdefg", "n": 3}, "prompt_logprobs"),
    ],
)
async def test_the_log_probabilities_of_prompts_have_a_limit(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], param: str
) -> None:
    """Each takes about 110 bytes until the request ends: of 1,024 prompts of 7,900 tokens, 18 GiB."""
    monkeypatch.setattr(generation, "MAX_PROMPT_LOGPROBS", 20)
    response = await http.post("/v1/completions", json={"temperature": 1, "max_tokens": 1, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert "the limit is 20" in error["message"]
    monkeypatch.setattr(generation, "MAX_PROMPT_LOGPROBS", 24)
    assert (await http.post("/v1/completions", json={"temperature": 1, "max_tokens": 1, **fields})).status_code == 200
