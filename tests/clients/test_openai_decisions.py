"""Decisions by OpenAI's Python client, unmodified, with this server on a socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI, UnprocessableEntityError
from openai.types.decision import (
    AnswerAnswerResourceChoice,
    AnswerAnswerResourcePredicate,
    AnswerAnswerResourceRefusal,
    AnswerAnswerResourceScore,
    Decision,
)

from tests.clients.serving import CONFIG, KEY
from tests.server.conftest import data_url, png

RED, BLUE = data_url(png("red")), data_url(png("blue"))
PREDICATE: Any = {"type": "predicate", "instructions": "Is it red?", "name": "red"}
CHOICE: Any = {
    "type": "choice",
    "instructions": "Which animal?",
    "name": "animal",
    "choices": [{"value": "cat", "description": "It meows."}, {"value": "dog"}, {"value": False}],
}
SCORE: Any = {
    "type": "score",
    "instructions": "How sharp is it?",
    "levels": [{"label": "blurred", "description": "No edges."}, {"label": "soft"}, {"label": "sharp"}],
}
PETS: Any = {"type": "choice", "instructions": "Which?", "choices": [{"value": "cat"}, {"value": "dog"}]}
EXAMPLES = [{"id": "a", "image": RED, "label": "cat"}, {"id": "b", "image": BLUE, "label": "dog"}]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as http:
        yield http


def show(*urls: str, text: str = "") -> Any:
    parts = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in urls]
    return [{"type": "message", "role": "user", "content": [*parts, {"type": "input_text", "text": text}]}]


def decide(client: OpenAI, *questions: Any, **fields: Any) -> Decision:
    return client.decisions.create(**{"model": CONFIG.name, "input": show(RED), "questions": questions, **fields})


def test_all_kinds_of_questions_about_one_image(client: OpenAI) -> None:
    decision = decide(client, PREDICATE, CHOICE, SCORE, safety_identifier="a-user", prompt_cache_key="mine")
    predicate, choice, score = decision.answers
    assert isinstance(predicate, AnswerAnswerResourcePredicate)
    assert (predicate.name, 0 < predicate.probability < 1) == ("red", True)

    assert isinstance(choice, AnswerAnswerResourceChoice)
    probabilities = {item.value: item.probability for item in choice.probabilities}
    assert list(probabilities) == ["cat", "dog", False]
    assert sum(probabilities.values()) == pytest.approx(1)
    assert choice.confidence == probabilities[choice.choice] == max(probabilities.values())

    assert isinstance(score, AnswerAnswerResourceScore)
    assert (score.name, [item.label for item in score.probabilities]) == (None, ["blurred", "soft", "sharp"])
    assert [item.value for item in score.probabilities] == [0, 1, 2]
    assert score.score == pytest.approx(sum(item.value * item.probability for item in score.probabilities))
    assert score.confidence == max(item.probability for item in score.probabilities)

    assert decision.model == CONFIG.name
    usage = decision.usage
    assert usage.total_tokens == usage.input_tokens > 0
    assert (usage.output_tokens, usage.output_tokens_details.reasoning_tokens) == (0, 0)
    assert usage.input_tokens_details.cache_write_tokens == 0


def test_an_image_is_encoded_once_for_all_questions(client: OpenAI) -> None:
    decision = decide(client, PREDICATE, CHOICE, SCORE, input=show(data_url(png("teal", (31, 17)))))
    details: Any = decision.usage.model_extra
    assert details["fewshot_details"] | {"candidate_tokens": 0} == {
        "media": 3,
        "media_encoded": 1,
        "media_cached": 2,
        "media_deduplicated": 0,
        "prompts": 3,
        "candidate_tokens": 0,
    }


def test_another_image_and_another_text_give_another_answer(client: OpenAI) -> None:
    inputs = (show(RED), show(BLUE), show(BLUE, RED), show(RED, text="It is old."), "It is old.")
    probabilities = [decide(client, PREDICATE, input=each).answers for each in inputs]
    assert len({str(answers) for answers in probabilities}) == len(inputs)
    assert decide(client, PREDICATE, input=show(RED)).answers == probabilities[0]


def test_more_choices_than_others_have_letters_for(client: OpenAI) -> None:
    question = {**PETS, "choices": [{"value": f"animal {index}"} for index in range(100)]}
    (answer,) = decide(client, question).answers
    assert isinstance(answer, AnswerAnswerResourceChoice)
    assert len(answer.probabilities) == 100


def test_probabilities_equal_those_of_a_classification_with_the_same_prompt(client: OpenAI, http: httpx.Client) -> None:
    shots = [{"image": example["image"], "label": example["label"], "question": "Which?"} for example in EXAMPLES]
    fields = {"candidates": ["cat", "dog"], "template": "vqa", "method": "in_context", "shots": shots}
    query = {"image": RED, "question": "Which?"}
    classified = http.post("/v1/classify", json={**fields, "query": query}).json()["candidates"]
    bare_shots = [{"image": example["image"], "label": example["label"]} for example in EXAMPLES]
    (answer,) = decide(client, PETS, extra_body={"shots": bare_shots, "method": "in_context"}).answers
    assert isinstance(answer, AnswerAnswerResourceChoice)
    expected = {candidate["label"]: candidate["probability"] for candidate in classified}
    assert {item.value: item.probability for item in answer.probabilities} == pytest.approx(expected, abs=1e-5)


def test_examples_of_a_support_set(client: OpenAI, http: httpx.Client) -> None:
    assert http.post("/v1/support_sets", json={"name": "pets", "examples": EXAMPLES}).status_code == 200
    decision = decide(client, PETS, PREDICATE, extra_body={"examples": {"support_set": "pets"}, "timeout": 60})
    choice, predicate = decision.answers
    assert isinstance(choice, AnswerAnswerResourceChoice)
    assert isinstance(predicate, AnswerAnswerResourcePredicate)
    assert choice.choice == "cat"
    assert (choice.model_extra or {})["method"] == "nearest_mean"
    details: Any = decision.usage.model_extra
    assert details["fewshot_details"]["version"] == 1


def test_a_question_that_is_too_long_is_refused_alone(client: OpenAI) -> None:
    long = {**PREDICATE, "name": "long", "instructions": "word " * 2000}
    refusal, predicate = decide(client, long, PREDICATE).answers
    assert isinstance(refusal, AnswerAnswerResourceRefusal)
    assert refusal.name == "long"
    assert isinstance(predicate, AnswerAnswerResourcePredicate)
    with pytest.raises(BadRequestError) as caught:
        decide(client, long)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"input": show("https://example.com/a.png")}, UnprocessableEntityError, "input[0].content[0].image_url"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}]}, None, "input[0]"),
        ({"input": show("data:image/png;base64,AAAA")}, BadRequestError, "input[0].content[0].image_url"),
        ({"prompt_cache_options": {"mode": "explicit"}}, UnprocessableEntityError, "prompt_cache_options.mode"),
        ({"questions": [PREDICATE] * 401}, BadRequestError, "questions"),
        ({"questions": [{**PETS, "choices": [{"value": True}, {"value": "yes"}]}]}, BadRequestError, None),
        ({"model": "gpt-6-luna"}, NotFoundError, None),
        ({"extra_body": {"top_p": 0}}, UnprocessableEntityError, "top_p"),
    ],
)
def test_errors_name_the_invalid_field(client: OpenAI, fields: dict[str, Any], kind: Any, param: str | None) -> None:
    with pytest.raises(kind or UnprocessableEntityError) as caught:
        decide(client, **{"questions": [PREDICATE], **fields})
    assert param in (None, caught.value.param)
    assert caught.value.code
