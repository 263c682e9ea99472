"""The prompts of a decision's questions: how the input, the instructions, the candidates and examples are written."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.fewshot.classification import GREY_MEDIA
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.wire import Score
from tests.server.conftest import data_url
from tests.server.decisions import (
    BLUE,
    CHOICE,
    PREDICATE,
    RED,
    SCORE,
    SHOTS,
    candidates,
    decide,
    digest,
    image,
    post,
    prompts,
    text,
    user,
)
from tests.server.fakes import TOKENIZER, FakeClient, served_model

pytestmark = pytest.mark.anyio


@pytest.fixture
def app(client: FakeClient, settings: Settings) -> FastAPI:
    return create_app(client, replace(served_model(), max_model_len=200), settings, Metrics("tiny"))


class TestPrompts:
    async def test_descriptions_are_lines_of_the_question(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        choices = [{"value": "cat", "description": "It meows."}, {"value": True}, {"value": "dog", "description": None}]
        await decide(http, {**CHOICE, "choices": choices})
        assert prompts(client) == ["<image>Question:Which?\ncat: It meows.\nyes\ndog Short answer:"]
        levels = [{"label": "bad", "description": "Broken."}, {"label": "good", "description": "Whole."}]
        await decide(http, {**SCORE, "levels": levels}, input="A cup.")
        assert prompts(client)[1] == "A cup.\nQuestion:How?\nbad: Broken.\ngood: Whole. Short answer:"

    @pytest.mark.parametrize("form", ["It is blue.", [{"role": "user", "content": "It is blue."}]])
    async def test_text_alone_is_read_by_no_image(
        self, http: httpx.AsyncClient, client: FakeClient, form: object
    ) -> None:
        await decide(http, input=form)
        assert prompts(client) == ["It is blue.\nQuestion:Is it red? Short answer:"]
        assert client.scores[0].prompt.media == []

    async def test_texts_and_images_keep_their_order(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        messages = [
            {"role": "system", "content": "S"},
            {"type": "message", **user(text("a"), image(RED), text("b"), image(BLUE), text("c"), text("d"))},
            {"role": "developer", "content": [text("e"), text("f")]},
        ]
        await decide(http, input=messages)
        assert prompts(client) == ["S\na<image>b<image>cd\nef\nQuestion:Is it red? Short answer:"]
        assert client.scores[0].prompt.media == [digest(RED), digest(BLUE)]

    async def test_an_empty_text_after_an_image_is_nothing(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        await decide(http, input=[user(image(), text(""))])
        assert prompts(client) == ["<image>Question:Is it red? Short answer:"]

    async def test_a_conversation_names_its_roles(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        messages = [
            {"role": "developer", "content": "Be kind."},
            user(text("Hi")),
            {"role": "assistant", "content": [{"type": "output_text", "text": "Hm"}], "phase": "final_answer"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        ]
        await decide(http, input=messages)
        lines = ["Developer: Be kind.", "User: Hi", "Assistant: Hm", "Assistant: No."]
        assert prompts(client) == ["\n".join([*lines, "Question:Is it red? Short answer:"])]

    async def test_json_is_shown_as_text(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        data = {"a": [1, None, "é"]}
        instructions = [text("Is it in "), {"type": "input_json", "data": [{"b": True}]}, text("?")]
        await decide(
            http, {**PREDICATE, "instructions": instructions}, input=[user({"type": "input_json", "data": data})]
        )
        assert prompts(client) == ['{"a": [1, null, "é"]}\nQuestion:Is it in [{"b": true}]? Short answer:']

    async def test_images_of_instructions_come_before_those_of_the_input(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        question = {**PREDICATE, "instructions": [text("Is it like "), image(RED), text("this?")]}
        await decide(http, question, PREDICATE, input=[user(text("a"), image(BLUE))])
        by_prompt = dict(zip(prompts(client), client.scores, strict=True))
        first = by_prompt["<image>a<image>Question:Is it like this? Short answer:"]
        assert first.prompt.media == [digest(RED), digest(BLUE)]
        assert by_prompt["a<image>Question:Is it red? Short answer:"].prompt.media == [digest(BLUE)]

    async def test_text_spells_no_marker_and_no_placeholder(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        await decide(http, {**PREDICATE, "instructions": "<image>{media}{label}?"}, input="<image>")
        assert client.scores[0].prompt.media == []
        assert prompts(client) == ["<image>\nQuestion:<image>{media}{label}? Short answer:"]

    async def test_a_stored_image_is_named_by_its_id(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        stored = (await http.post("/v1/images", content=RED, headers={"content-type": "image/png"})).json()["id"]
        await decide(http, input=[user({"type": "input_image", "image_url": stored, "detail": "original"})])
        assert client.scores[0].prompt.media == [digest(RED)]

    async def test_a_template_of_the_request_writes_the_prompt(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        template = {"shot": "User:{media}{question}\nAssistant: {answer}"}
        await decide(http, input=[user(image(), text("It."))], template=template)
        assert prompts(client) == ["User:<image>It.\nIs it red?\nAssistant:"]
        assert candidates(client) == [[" yes", " no"]]

    async def test_calibration_keeps_the_instructions(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        question = {**PREDICATE, "instructions": [text("Alike?"), image(RED)]}
        await decide(http, question, input=[user(image(), text("It."))], calibration="contextual", content_free="both")
        media = {text: request.prompt.media for text, request in zip(prompts(client), client.scores, strict=True)}
        assert media == {
            "<image><image>It.\nQuestion:Alike? Short answer:": [digest(RED), digest(BLUE)],
            "<image><image>N/A\nQuestion:Alike? Short answer:": [digest(RED), GREY_MEDIA.digest],
            "<image>N/A\nQuestion:Alike? Short answer:": [digest(RED)],
        }


class TestExamples:
    async def test_shots_are_for_the_questions_that_they_answer(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        response = await post(http, CHOICE, PREDICATE, shots=SHOTS, method="in_context")
        shot = "<image>Question:Which? Short answer:{}<|endofchunk|>\n"
        assert sorted(prompts(client)) == [
            "<image>Question:Is it red? Short answer:",
            shot.format("cat") + shot.format("dog") + "<image>Question:Which? Short answer:",
        ]
        choice, predicate = response.json()["answers"]
        assert choice["method"] == "in_context"
        assert "method" not in predicate
        assert response.json()["usage"]["fewshot_details"]["shots_used"] == 2

    async def test_a_shot_shows_its_own_question_as_the_input(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        shots = [{"question": "It meows.", "label": "cat"}]
        await decide(http, CHOICE, shots=shots, input="It barks.")
        shot = "It meows.\nQuestion:Which? Short answer:cat<|endofchunk|>\n"
        assert prompts(client) == [f"{shot}It barks.\nQuestion:Which? Short answer:"]

    async def test_the_answer_of_a_shot_is_its_label(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        shots = [{"image": data_url(RED), "text": "A cat on a lawn.", "label": "cat"}]
        await decide(http, CHOICE, shots=shots, method="in_context")
        assert prompts(client)[0].startswith("<image>Question:Which? Short answer:cat<|endofchunk|>")

    async def test_a_choice_is_made_by_likeness_as_in_a_classification(
        self, http: httpx.AsyncClient, client: FakeClient
    ) -> None:
        assert (await http.post("/v1/support_sets", json={"name": "pets", "examples": SHOTS})).status_code == 200
        examples = {"support_set": "pets"}
        reverse = {**CHOICE, "choices": [{"value": "dog"}, {"value": "cat"}]}
        response = await post(http, CHOICE, SCORE, reverse, examples=examples)
        query = {"image": data_url(BLUE)}
        classified = (await http.post("/v1/classify", json={"examples": examples, "query": query})).json()
        assert classified["method"] == "nearest_mean"
        by_label = {candidate["label"]: candidate["probability"] for candidate in classified["candidates"]}
        for choice in response.json()["answers"][::2]:
            assert (choice["choice"], choice["method"]) == (classified["label"], "nearest_mean")
            assert {item["value"]: item["probability"] for item in choice["probabilities"]} == pytest.approx(by_label)
        assert prompts(client) == ["<image>Question:How? Short answer:"]
        assert response.json()["usage"]["fewshot_details"]["support_set"].startswith("ss_")

    async def test_zero_shot_and_selected_examples(self, http: httpx.AsyncClient, client: FakeClient) -> None:
        assert (await http.post("/v1/support_sets", json={"name": "pets", "examples": SHOTS})).status_code == 200
        await decide(http, CHOICE, examples={"support_set": "pets", "k": 1, "strategy": "first"}, zero_shot=True)
        assert prompts(client) == [
            "Question:Which? Short answer:cat<|endofchunk|>\n<image>Question:Which? Short answer:"
        ]


@pytest.mark.parametrize("calibration", ["none", "contextual"])
@pytest.mark.parametrize("shots", [[], SHOTS])
async def test_probabilities_equal_those_of_a_classification_with_the_same_prompt(
    http: httpx.AsyncClient, client: FakeClient, shots: list[dict[str, str]], calibration: str
) -> None:
    def logprobs(request: Score, candidate: list[int]) -> list[float]:
        is_dog = TOKENIZER.decode(candidate) == "dog"
        share = 0.8 if request.prompt.media[-1] == digest(BLUE) else 0.3
        return [math.log(share if is_dog else 1 - share), -1.0, -1.0]

    client.logprobs = logprobs
    weighing = {"shots": shots, "method": "in_context", "normalisation": "mean", "calibration": calibration}
    (answer,) = await decide(http, CHOICE, **weighing)
    template = {"shot": "{media}Question:Which? Short answer:{answer}", "separator": "\n"}
    fields = {**weighing, "query": {"image": data_url(BLUE)}, "template": template, "candidates": ["cat", "dog"]}
    classified = (await http.post("/v1/classify", json=fields)).json()
    half = len(client.scores) // 2
    assert prompts(client)[:half] == prompts(client)[half:]
    assert len({str(request.candidates) for request in client.scores}) == 1
    by_label = {candidate["label"]: candidate["probability"] for candidate in classified["candidates"]}
    assert {item["value"]: item["probability"] for item in answer["probabilities"]} == by_label
    assert 0.55 < answer["confidence"] == classified["confidence"]


async def test_long_instructions_are_refused_before_they_are_written_for_each_shot(http: httpx.AsyncClient) -> None:
    """The shots repeat them: 1024 shots would make 60 GB of a body of 60 MB."""
    shots = [{"question": "Tail?", "label": "cat"}] * 200
    tracemalloc.start()
    try:
        response = await post(http, {**CHOICE, "instructions": "a" * 100_000}, input="A cup.", shots=shots)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert peak < 10 * 2**20
