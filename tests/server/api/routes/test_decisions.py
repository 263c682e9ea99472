"""POST /v1/decisions: its answers, what they count, and what is refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api.routes.decisions import MAX_CONCURRENT
from server.app import create_app
from server.errors import EngineFailed
from server.media.source import EncodedMedia
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.wire import Score, Scored
from tests.server.decisions import (
    BLUE,
    CHOICE,
    PREDICATE,
    SCORE,
    SHOTS,
    candidates,
    decide,
    digest,
    image,
    post,
    prompts,
    shares,
    text,
    user,
)
from tests.server.fakes import TOKENIZER, FakeClient, served_model

pytestmark = pytest.mark.anyio


@pytest.fixture
def app(client: FakeClient, settings: Settings) -> FastAPI:
    return create_app(client, replace(served_model(), max_model_len=200), settings, Metrics("tiny"))


class TestAnswers:
    async def test_a_predicate_is_the_probability_of_yes(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        client.logprobs = shares(yes=0.3, no=0.1)
        assert await decide(http) == [{"type": "predicate", "name": "red", "probability": pytest.approx(0.75)}]
        assert prompts(client) == ["<image>Question:Is it red? Short answer:"]
        assert candidates(client) == [["yes", "no"]]
        assert client.scores[0].prompt.media == [digest(BLUE)]

    async def test_a_choice_has_the_probabilities_in_the_order_of_the_request(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        client.logprobs = shares(cat=0.1, dog=0.3)
        assert await decide(http, CHOICE) == [
            {
                "type": "choice",
                "name": None,
                "choice": "dog",
                "confidence": pytest.approx(0.75),
                "probabilities": [
                    {"value": "cat", "probability": pytest.approx(0.25)},
                    {"value": "dog", "probability": pytest.approx(0.75)},
                ],
            }
        ]

    async def test_a_boolean_is_written_yes_or_no_and_stays_a_boolean(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        client.logprobs = shares(yes=0.1, no=0.3, true=0.4)
        choices = [{"value": True}, {"value": "true"}, {"value": False}]
        (answer,) = await decide(http, {**CHOICE, "choices": choices[::2]})
        assert answer["choice"] is False
        assert [item["value"] for item in answer["probabilities"]] == [True, False]
        (answer,) = await decide(http, {**CHOICE, "choices": choices})
        assert answer["choice"] == "true"
        assert [item["probability"] for item in answer["probabilities"]] == pytest.approx([0.125, 0.5, 0.375])

    async def test_a_score_is_the_mean_of_the_indices(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        client.logprobs = shares(bad=0.1, fair=0.2, good=0.2)
        (answer,) = await decide(http, {**SCORE, "name": "quality"})
        assert (answer["type"], answer["name"]) == ("score", "quality")
        assert answer["score"] == pytest.approx(0.4 + 2 * 0.4)
        assert answer["confidence"] == pytest.approx(0.4)
        assert answer["probabilities"][1] == {"label": "fair", "value": 1, "probability": pytest.approx(0.4)}

    async def test_more_candidates_than_there_are_letters(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        values = [f"value {index}" for index in range(300)]
        client.logprobs = lambda request, candidate: [-float(TOKENIZER.decode(candidate) != "value 299")] * 2
        (answer,) = await decide(http, {**CHOICE, "choices": [{"value": value} for value in values]})
        assert answer["choice"] == "value 299"
        assert len(answer["probabilities"]) == 300

    async def test_questions_are_answered_in_order_and_counted_together(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        response = await post(http, CHOICE, PREDICATE, SCORE, request_id="mine", priority=7)
        body = response.json()
        assert [answer["type"] for answer in body["answers"]] == ["choice", "predicate", "score"]
        assert (body["id"], body["object"], body["model"]) == ("decision-mine", "decision", "tiny")
        assert {request.priority for request in client.scores} == {7}
        num_tokens = sum(len(request.prompt.token_ids) for request in client.scores)
        usage = body["usage"]
        details = usage.pop("fewshot_details")
        assert usage == {
            "input_tokens": num_tokens,
            "input_tokens_details": {"cached_tokens": 6, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_tokens,
        }
        num_candidate_tokens = sum(len(ids) for request in client.scores for ids in request.candidates)
        assert (details["prompts"], details["media"]) == (3, 3)
        assert details["candidate_tokens"] == num_candidate_tokens


class TestRefusals:
    async def test_a_question_that_is_too_long_is_refused_alone(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        long = {**PREDICATE, "instructions": "a" * 190}
        value = {**CHOICE, "name": "long", "choices": [{"value": "a"}, {"value": "b" * 190}]}
        answers = await decide(http, long, PREDICATE, value)
        assert answers[0] == {"type": "refusal", "name": "red"}
        assert answers[1]["type"] == "predicate"
        assert answers[2] == {"type": "refusal", "name": "long"}
        assert len(client.scores) == 1

    async def test_a_request_that_is_too_long_for_every_question_is_an_error(
        self, http: httpx.AsyncClient, app: FastAPI
    ) -> None:
        response = await post(http, PREDICATE, CHOICE, input="a" * 190)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input")
        lines = app.state.services.metrics.expose().decode().splitlines()
        assert sum(float(line.split()[-1]) for line in lines if "request_success_total{" in line) == 0

    async def test_an_engine_failure_fails_the_request_and_no_other(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        def fail(request: Score, candidate: list[int]) -> list[float]:
            raise EngineFailed("gave up")

        client.logprobs = fail
        response = await post(http, PREDICATE, CHOICE)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
        client.logprobs = shares(yes=0.5, no=0.5)
        assert len(await decide(http)) == 1


async def test_questions_run_concurrently_up_to_a_limit(
    http: httpx.AsyncClient, client: FakeClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, score, is_full = 0, 0, client.score, asyncio.Event()
    model = app.state.services.model

    async def counted(request: Score, media: Mapping[bytes, EncodedMedia]) -> Scored:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        if running == MAX_CONCURRENT:
            # texts take turns: after so many, every question that may run has its prompt
            for _ in range(100):
                await model.tokenize(int)
            is_full.set()
        async with asyncio.timeout(60):
            await is_full.wait()
        running -= 1
        return await score(request, media)

    monkeypatch.setattr(client, "score", counted)
    questions = [{**PREDICATE, "instructions": f"{index}?", "name": str(index)} for index in range(400)]
    answers = await decide(http, *questions, input="a")
    assert [answer["name"] for answer in answers] == [str(index) for index in range(400)]
    assert most == MAX_CONCURRENT


HINTS = {
    "safety_identifier": "someone",
    "prompt_cache_key": "mine",
    "prompt_cache_options": {"mode": "implicit", "ttl": "30m"},
    "user": "someone",
}


async def test_hints_are_accepted_and_change_nothing(http: httpx.AsyncClient) -> None:
    marked = user({**text("a"), "prompt_cache_breakpoint": {"mode": "explicit"}}, {**image(), "detail": "high"})
    plain = await decide(http, input=[user(text("a"), image())])
    assert await decide(http, input=[marked], **HINTS) == plain


def choice(*values: Any) -> list[dict[str, Any]]:
    return [{**CHOICE, "choices": [{"value": value} for value in values]}]


CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
NO_MEDIA = [{"label": "cat", "question": "It meows."}]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [user(text(" "))]}, 400, "input"),
        ({"input": [CALL]}, 422, "input[0]"),
        ({"input": [{**CALL, "type": "custom_tool_call_output", "output": "a"}]}, 422, "input[0]"),
        ({"input": [user({"type": "input_file", "file_id": "a"})]}, 422, "input[0].content[0].type"),
        ({"input": [user({"type": "input_image", "file_id": "a"})]}, 422, "input[0].content[0].file_id"),
        ({"input": [user(text("a"), {**image(), "image_url": "a"})]}, 400, "input[0].content[1].image_url"),
        ({"input": [user({**image(), "image_url": "img_0"})]}, 404, "input[0].content[0].image_url"),
        ({"input": [user({**image(), "image_url": "img_" + "0" * 200})]}, 404, "input[0].content[0].image_url"),
        ({"input": [user({**image(), "image_url": "https://a.b"})]}, 422, "input[0].content[0].image_url"),
        ({"input": [user(*[image()] * 4)]}, 400, "input"),
        ({"input": [{"role": "system", "content": [image()]}]}, 422, "input[0].content[0].image_url"),
        ({"input": [{"role": "tool", "content": "a"}]}, 422, "input[0].role"),
        ({"questions": []}, 400, "questions"),
        ({"questions": [PREDICATE] * 401}, 400, "questions"),
        ({"questions": [*choice(*map(str, range(1024))) * 4, PREDICATE]}, 400, "questions"),
        ({"questions": [{**PREDICATE, "type": "box"}]}, 422, "questions[0].type"),
        ({"questions": [{**PREDICATE, "instructions": " "}]}, 400, "questions[0].instructions"),
        ({"questions": [{**PREDICATE, "instructions": [image()]}]}, 400, "questions[0].instructions"),
        ({"questions": [PREDICATE, {**PREDICATE, "levels": []}]}, 422, "questions[1].levels"),
        ({"questions": choice("a")}, 400, "questions[0].choices"),
        ({"questions": choice("a", 1)}, 400, "questions[0].choices[1].value"),
        ({"questions": choice("a", "a")}, 400, "questions[0].choices[1].value"),
        ({"questions": choice("yes", True)}, 400, "questions[0].choices[1].value"),
        ({"questions": [{**SCORE, "levels": [{"label": "a"}] * 2}]}, 400, "questions[0].levels[1].label"),
        ({"prompt_cache_options": {"mode": "explicit"}}, 422, "prompt_cache_options.mode"),
        ({"top_p": 0}, 422, "top_p"),
        ({"model": "other"}, 404, "model"),
        ({"priority": -1}, 400, "priority"),
        ({"template": "classification"}, 400, "template"),
        ({"template": {"shot": "{question} {answer}"}}, 400, "template"),
        ({"shots": SHOTS}, 400, "shots"),
        ({"method": "knn"}, 400, "method"),
        ({"questions": [CHOICE], "shots": SHOTS, "examples": {"support_set": "a"}}, 400, "examples"),
        ({"questions": [CHOICE], "shots": SHOTS[:1], "method": "knn"}, 400, "questions[0].choices[1].value"),
        ({"questions": [CHOICE], "shots": SHOTS, "input": "a", "zero_shot": True, "method": "knn"}, 400, "input"),
        ({"questions": [CHOICE], "shots": NO_MEDIA}, 400, "shots[0]"),
        ({"questions": [CHOICE], "shots": SHOTS, "input": "a"}, 400, "shots[0]"),
        ({"questions": [CHOICE], "examples": {"support_set": "none"}}, 404, "examples.support_set"),
    ],
)
async def test_an_error_names_the_invalid_field(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str | None
) -> None:
    response = await post(http, **{"questions": [PREDICATE], **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
