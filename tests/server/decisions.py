"""Helpers for tests of decisions: questions, inputs, and what a scripted client got and answers."""

from __future__ import annotations

import math
from typing import Any

import httpx

from server.media.source import encoded
from server.wire import Score
from tests.server.conftest import data_url, png
from tests.server.fakes import TOKENIZER, FakeClient

RED, GREEN, BLUE = (png(colour) for colour in ("red", "green", "blue"))
PREDICATE = {"type": "predicate", "instructions": "Is it red?", "name": "red"}
CHOICE = {"type": "choice", "instructions": "Which?", "choices": [{"value": "cat"}, {"value": "dog"}]}
SCORE = {"type": "score", "instructions": "How?", "levels": [{"label": "bad"}, {"label": "fair"}, {"label": "good"}]}
SHOTS = [{"image": data_url(RED), "label": "cat"}, {"image": data_url(GREEN), "label": "dog"}]


def text(value: str) -> dict[str, Any]:
    return {"type": "input_text", "text": value}


def image(data: bytes = BLUE) -> dict[str, Any]:
    return {"type": "input_image", "image_url": data_url(data)}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*parts]}


def digest(data: bytes) -> bytes:
    return encoded(data, "image", "").digest


def shares(**by_text: float) -> Any:
    """Return log-probabilities of these shares, all of a candidate's on its first token."""

    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        return [math.log(by_text[TOKENIZER.decode(candidate)])] + [0.0] * (len(candidate) - 1)

    return logprobs


def prompts(client: FakeClient) -> list[str]:
    return [TOKENIZER.decode(request.prompt.token_ids, skip_special_tokens=False) for request in client.scores]


def candidates(client: FakeClient) -> list[list[str]]:
    return [[TOKENIZER.decode(ids) for ids in request.candidates] for request in client.scores]


async def post(http: httpx.AsyncClient, *questions: Any, **fields: Any) -> httpx.Response:
    body = {"input": [user(image())], "questions": questions or [PREDICATE], **fields}
    return await http.post("/v1/decisions", json=body)


async def decide(http: httpx.AsyncClient, *questions: Any, **fields: Any) -> list[dict[str, Any]]:
    response = await post(http, *questions, **fields)
    assert response.status_code == 200, response.text
    answers: list[dict[str, Any]] = response.json()["answers"]
    return answers
