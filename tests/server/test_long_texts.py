"""A long text blocks nothing: it is refused by its bytes, or encoded in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from model.prompt import PromptTokenizer
from server.api import answers, writer
from server.api.answer_text import Echo, ShownToken, completion_logprobs
from tests.server.conftest import data_url, png
from tests.server.fakes import TOKENIZER, served_model

pytestmark = pytest.mark.anyio
LIMIT = served_model().max_model_len * TOKENIZER.max_token_bytes
IMAGE = {"image": data_url(png())}
SHOTS = [{**IMAGE, "label": "a"}, {**IMAGE, "label": "b"}]


def bodies(text: str) -> dict[str, dict[str, object]]:
    return {
        "/v1/completions": {"prompt": text},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/fewshot/completions": {
            "shots": [{**IMAGE, "question": "q", "text": "a"}],
            "query": {**IMAGE, "question": text},
            "template": "vqa",
        },
        "/v1/classify": {"shots": SHOTS, "query": IMAGE, "candidates": ["a", text]},
        "/v1/decisions": {"input": text, "questions": [{"type": "predicate", "instructions": "a"}]},
        "/v1/score": {"prompt": "a", "candidates": [text, "b"]},
        "/v1/embeddings": {"input": [text, "b"]},
        "/v1/inspect": {"prompt": [{"type": "image_url", "image_url": {"url": data_url(png())}}], "answer": text},
        "/tokenize": {"prompt": text},
    }


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The threads that encode a text."""
    names: set[str] = set()
    for method in ("encode", "encode_plain"):
        original = getattr(PromptTokenizer, method)

        def recorded(self: PromptTokenizer, text: Sequence[str], original: object = original) -> object:
            if "zebra" in "".join(text):  # the scripted client encodes its answers, too
                names.add(threading.current_thread().name)
            return original(self, text)  # type: ignore[operator]

        monkeypatch.setattr(PromptTokenizer, method, recorded)
    return names


@pytest.mark.parametrize("route", bodies(""))
async def test_a_text_of_too_many_bytes_is_refused_unencoded(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    original = PromptTokenizer.encode

    def encode(self: PromptTokenizer, written: list[str]) -> list[int]:
        assert sum(map(len, written)) < LIMIT
        return original(self, written)

    monkeypatch.setattr(PromptTokenizer, "encode", encode)
    response = await http.post(route, json=bodies("a" * (LIMIT + 1))[route])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("route", bodies(""))
async def test_texts_are_encoded_outside_the_event_loop(http: httpx.AsyncClient, threads: set[str], route: str) -> None:
    await http.post(route, json=bodies("a zebra")[route])
    assert threads
    assert threading.main_thread().name not in threads


async def test_a_text_up_to_the_limit_of_bytes_is_encoded(http: httpx.AsyncClient) -> None:
    response = await http.post("/tokenize", json={"prompt": "a" * LIMIT})
    assert response.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_many_tokens_are_written_outside_the_event_loop(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Those of a prompt of 8,000 tokens take a quarter of a second. They are written once, for all answers."""
    written: dict[int, list[bool]] = {4: [], 32: []}
    repeated: dict[int, list[bool]] = {4: [], 32: []}

    def is_in_loop() -> bool:
        return threading.current_thread() is threading.main_thread()

    def write(tokens: list[ShownToken], *arguments: Any) -> Any:
        if len(tokens) > 1:  # the next pieces of a stream have a token each
            written[num_tokens].append(is_in_loop())
        return completion_logprobs(tokens, *arguments)

    def echo(*arguments: Any) -> Echo:
        repeated[num_tokens].append(is_in_loop())
        return original_echo(*arguments)

    original_echo = Echo.of
    monkeypatch.setattr(Echo, "of", echo)
    monkeypatch.setattr(answers, "completion_logprobs", write)
    monkeypatch.setattr(writer, "MAX_SHOWN", 16)
    for num_tokens in written:
        body = {"prompt": [5] * num_tokens, "echo": True, "logprobs": 1, "max_tokens": 1, "stream": stream, "n": 3}
        response = await http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
    assert written == repeated == {4: [True], 32: [False]}


async def test_long_answers_take_no_thread_of_other_work() -> None:
    is_written, write = threading.Event(), writer.Writer().write
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    long = [asyncio.create_task(write(writer.MAX_SHOWN + 1, is_written.wait)) for _ in range(64)]
    try:
        await asyncio.sleep(0)  # all have begun
        assert await asyncio.wait_for(asyncio.to_thread(lambda: True), timeout=20)
    finally:
        is_written.set()
        assert all(await asyncio.gather(*long))
