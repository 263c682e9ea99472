"""POST /v1/fewshot/completions as clients see it: shots, templates and errors, with a scripted engine."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import server.prompt
from model.prompt import Media, Segment, Text
from server.fewshot.prompting import _largest
from server.settings import Settings
from server.store.records import NewExample, SupportSetInfo
from server.store.support_sets import SupportSets
from tests.server.colours import (
    END,
    IMAGES,
    LINE,
    QUERY,
    app,
    application,
    colours,
    complete,
    example,
    post,
    refusal,
    settings,
    shot,
    support_sets,
    token_ids,
    url,
)
from tests.server.conftest import image_part
from tests.server.documented import CHECKED
from tests.server.fakes import CONFIG, TOKENIZER, FakeClient
from tests.tiny_models import CONFIGS

__all__ = ["app", "colours", "settings", "support_sets"]  # fixtures

pytestmark = pytest.mark.anyio


# shots in the request

SHOTS: list[dict[str, Any]] = [
    {"id": "one", "image": url(IMAGES[0]), "answer": "warm"},
    {"media": [image_part()], "label": "cold"},
]


async def test_the_response_is_a_completion_that_reports_its_shots(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await complete(http, shots=SHOTS, request_id="mine", max_tokens=9)
    (request,) = client.requests
    expected: list[Segment] = [
        *shot(IMAGES[0], "warm"),
        *shot(IMAGES[0], "cold"),
        Media(QUERY.digest),
        Text("Output:"),
    ]
    assert request.prompt.token_ids == token_ids(*expected)
    assert request.prompt.media == [IMAGES[0].digest, IMAGES[0].digest, QUERY.digest]
    assert body["id"] == "cmpl-mine"
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "a cat", "logprobs": None, "finish_reason": "stop"}]
    assert body["fewshot"] == {
        "template": "caption",
        "strategy": None,
        "support_set": None,
        "version": None,
        "shots": [{"id": "one", "score": None, "label": None}, {"id": None, "score": None, "label": "cold"}],
        "shots_left_out": 0,
    }
    assert body["usage"]["fewshot_details"] == {
        "media": 3,
        "media_encoded": 1,
        "media_cached": 0,
        "media_deduplicated": 1,
        "shots_used": 2,
        "support_set": None,
        "version": None,
    }


async def test_the_prompt_equals_a_handwritten_one(http: httpx.AsyncClient, client: FakeClient) -> None:
    await complete(http, shots=SHOTS, seed=3)
    end, line = {"type": "end_of_chunk"}, {"type": "text", "text": "\n"}
    parts: list[Any] = []
    for image, answer in ((image_part(IMAGES[0].data), "warm"), (image_part(), "cold")):
        parts += [image, {"type": "text", "text": f"Output:{answer}"}, end, line]
    parts += [image_part(QUERY.data), {"type": "text", "text": "Output:"}]
    response = await http.post("/v1/completions", json={"prompt": parts, "seed": 3})
    assert response.status_code == 200
    few_shot, completion = client.requests
    names = ("prompt", "sampling")
    assert [getattr(few_shot, name) for name in names] == [getattr(completion, name) for name in names]


async def test_a_stream_reports_its_shots_in_the_first_chunk(http: httpx.AsyncClient) -> None:
    response = await post(http, shots=SHOTS, stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert ["fewshot" in chunk for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [shot["id"] for shot in chunks[0]["fewshot"]["shots"]] == ["one", None]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "a cat"
    assert chunks[-1]["usage"]["fewshot_details"]["shots_used"] == 2


async def test_echo_returns_the_prompt_with_its_markers(http: httpx.AsyncClient) -> None:
    body = await complete(http, shots=SHOTS[:1], echo=True, max_tokens=1)
    assert body["fewshot"]["prompt"] == "<image>Output:warm<|endofchunk|>\n<image>Output:"
    assert "prompt" not in (await complete(http, shots=SHOTS[:1]))["fewshot"]


async def test_zero_shot_uses_two_examples_without_their_images(
    http: httpx.AsyncClient, client: FakeClient, colours: SupportSetInfo
) -> None:
    body = await complete(http, examples={"support_set": "colours"}, zero_shot=True)
    texts: list[Segment] = [Text("Output:a red one"), END, Text("\nOutput:a green one"), END, LINE]
    assert client.requests[0].prompt.token_ids == token_ids(*texts, Media(QUERY.digest), Text("Output:"))
    assert client.requests[0].prompt.media == [QUERY.digest]
    assert [shot["id"] for shot in body["fewshot"]["shots"]] == ["e0", "e1"]


async def test_a_query_needs_no_shots(http: httpx.AsyncClient, client: FakeClient) -> None:
    assert (await complete(http))["fewshot"]["shots"] == []
    assert client.requests[0].prompt.token_ids == token_ids(Media(QUERY.digest), Text("Output:"))


# the end and the beginning of an answer

LINES: dict[str, Any] = {"shot": "{media}Output: {answer}", "end": "\n"}


async def test_the_end_of_the_template_is_the_default_stop_string(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.answer = " a cat\nOutput: a dog"
    stops: list[tuple[dict[str, Any], str]] = [
        ({}, "a cat"),
        ({"stop": "at"}, "a c"),
        ({"stop": []}, "a cat\nOutput: a dog"),
    ]
    for fields, text in stops:
        body = await complete(http, shots=SHOTS, template=LINES, max_tokens=30, **fields)
        assert body["choices"][0]["text"] == text
    segments: list[Segment] = [
        Media(IMAGES[0].digest),
        Text("Output: warm\n"),
        Media(IMAGES[0].digest),
        Text("Output: cold\n"),
    ]
    assert client.requests[0].prompt.token_ids == token_ids(*segments, Media(QUERY.digest), Text("Output:"))


async def test_choices_begin_with_the_space_of_the_template(http: httpx.AsyncClient, client: FakeClient) -> None:
    for form in ({"choice": ["a cat", "a dog"]}, {"regex": "a (cat|dog)"}):
        await complete(http, shots=SHOTS, template=LINES, structured_outputs=form)
    choice, regex = (request.sampling.grammar for request in client.requests)
    assert choice is not None
    assert choice.choices == (" a cat", " a dog")
    assert regex is not None
    assert regex.text == r"\ (?:a (cat|dog))"


async def test_the_end_of_chunk_token_ends_an_answer_even_if_it_is_no_eos_token(
    client: FakeClient, settings: Settings
) -> None:
    config = replace(CONFIG, prompt=replace(CONFIG.prompt, eos=("</s>",)))
    app = application(client, settings, config)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://localhost", event_hooks=CHECKED
    ) as http:
        await complete(http, shots=SHOTS[:1], stop_token_ids=[7])
    await app.state.services.decoder.stop()
    assert client.requests[0].sampling.stop_token_ids == (7, TOKENIZER.id_of("<|endofchunk|>"))


# invalid requests

SET: dict[str, Any] = {"support_set": "colours"}


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"shots": SHOTS, "examples": SET}, 400, "invalid_value", "examples"),
        ({"examples": {"support_set": "none"}}, 404, "support_set_not_found", "examples.support_set"),
        ({"examples": {**SET, "version": 9}}, 404, "support_set_not_found", "examples.version"),
        ({"examples": "colours"}, 400, "invalid_value", "examples"),
        ({"examples": {**SET, "k": 7}}, 400, "invalid_value", "examples.k"),
        ({"examples": {**SET, "k": 5}}, 400, "invalid_value", "examples.k"),
        ({"examples": {**SET, "strategy": "best"}}, 422, "unsupported_parameter", "examples.strategy"),
        ({"examples": {**SET, "order": "similar_last"}}, 400, "invalid_value", "examples.order"),
        ({"examples": {**SET, "strategy": "rices_text"}}, 400, "invalid_value", "query"),
        ({"examples": SET, "template": "vqa"}, 400, "invalid_value", "query.question"),
        ({"examples": {**SET, "sead": 3}}, 422, "unsupported_parameter", "examples.sead"),
        ({"shots": [*SHOTS, {"answer": "a"}]}, 400, "invalid_value", "shots[2]"),
        ({"shots": [{"image": url(QUERY)}]}, 400, "invalid_value", "shots[0]"),
        ({"shots": [{**SHOTS[0], "question": "?"}]}, 400, "invalid_value", "shots[0].question"),
        ({"shots": [{"image": "data:x", "text": "a"}]}, 400, "invalid_value", "shots[0].image"),
        ({"shots": [{"image": "img_1", "text": "a"}]}, 404, "image_not_found", "shots[0].image"),
        ({"shots": [{"image": "img_" + "0" * 200, "text": "a"}]}, 404, "image_not_found", "shots[0].image"),
        ({"shots": SHOTS * 3}, 400, "invalid_value", "shots"),
        ({"query": {"image": url(QUERY), "text": "?"}}, 400, "invalid_value", "query.text"),
        ({"template": "none"}, 400, "invalid_value", "template"),
        ({"template": {"shot": "{media}{answer}", "queri": ""}}, 422, "unsupported_parameter", "template.queri"),
        ({"template": {"shot": "{media}{image}{answer}"}}, 400, "invalid_value", "template.shot"),
        ({"template": {"shot": "{media}{answer}", "query": "Say:"}}, 400, "invalid_value", "template.query"),
        ({"examples": {**SET, "version": 2**70}}, 400, "invalid_value", "examples.version"),
        ({"temperature": -1}, 400, "invalid_value", "temperature"),
        ({"model": "other"}, 404, "model_not_found", "model"),
    ],
)
async def test_an_error_names_the_invalid_field(
    http: httpx.AsyncClient,
    client: FakeClient,
    colours: SupportSetInfo,
    fields: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
) -> None:
    response = await post(http, **fields)
    assert refusal(response) == (status, code, param), response.text
    assert client.requests == []


async def test_too_many_shots_are_refused_or_the_first_ones_left_out(
    http: httpx.AsyncClient, client: FakeClient, support_sets: SupportSets
) -> None:
    await support_sets.create("colours", [example(index, text="x" * 21) for index in range(6)])
    examples = {"support_set": "colours", "strategy": "first", "k": 4}  # 31 tokens per shot, 8 for the query
    response = await post(http, examples=examples)
    assert refusal(response) == (400, "context_length_exceeded", "examples.k")
    message = "the prompt has 132 tokens with its 4 shots and 8 without, the model's limit is 128"
    assert response.json()["error"]["message"] == message
    assert refusal(await post(http, shots=[{**SHOTS[0], "answer": "x" * 200}])) == (
        400,
        "context_length_exceeded",
        "shots",
    )
    long = {"image": url(QUERY), "question": "x" * 200}
    response = await post(http, shots=[{**SHOTS[0], "question": "?"}], query=long, template="vqa")
    assert refusal(response) == (400, "context_length_exceeded", "query"), response.text
    for max_tokens, ids in [(16, ["e1", "e2", "e3"]), (58, ["e2", "e3"]), (120, [])]:
        body = await complete(http, examples=examples, truncate_shots=True, max_tokens=max_tokens)
        assert [shot["id"] for shot in body["fewshot"]["shots"]] == ids
        assert body["fewshot"]["shots_left_out"] == 4 - len(ids)
        images = [IMAGES[int(name.removeprefix("e"))].digest for name in ids]
        assert client.requests[-1].prompt.media == [*images, QUERY.digest]
    assert refusal(await post(http, examples=examples, truncate_shots=True, max_tokens=121)) == (
        400,
        "context_length_exceeded",
        "max_tokens",
    )


async def test_shots_of_more_characters_than_are_encoded_are_left_out(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.prompt, "CHARACTERS_PER_TOKEN", 2)
    shots = [{**SHOTS[0], "answer": "x" * 100}] * 3  # more than 256 characters, and tokens
    assert refusal(await post(http, shots=shots)) == (400, "context_length_exceeded", "query")
    body = await complete(http, shots=shots, truncate_shots=True, max_tokens=1)
    assert body["fewshot"]["shots_left_out"] == 2


async def test_a_shot_that_is_left_out_need_not_be_able_to_attend_alone(http: httpx.AsyncClient) -> None:
    text = "x" * 30  # the second shot and the query fit
    shots = [
        {"media": [image_part(IMAGES[0].data), image_part(IMAGES[1].data)], "answer": 3 * text},
        {"image": url(IMAGES[2]), "answer": text},
    ]
    fields: dict[str, Any] = {"shots": shots, "shots_attend": "alone", "max_tokens": 1}
    assert refusal(await post(http, **fields))[2] == "shots_attend"
    body = await complete(http, **fields, truncate_shots=True)
    assert body["fewshot"]["shots_left_out"] == 1


async def test_a_prompt_that_fits_is_encoded_once(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Mock(wraps=server.prompt.encode_segments)
    monkeypatch.setattr("server.fewshot.prompting.encode_segments", encode)
    for attend in ("previous", "alone"):
        await complete(http, shots=SHOTS, truncate_shots=True, max_tokens=1, shots_attend=attend)
    assert encode.call_count == 2


@given(num_shots=st.integers(0, 70), num_fitting=st.integers(0, 70))
def test_the_most_shots_that_fit_are_kept(num_shots: int, num_fitting: int) -> None:
    checked = list[int]()

    def fits(number: int) -> bool:
        checked.append(number)
        return number <= num_fitting

    assert _largest(fits, num_shots + 1) == min(num_shots, num_fitting)
    assert max(checked, default=0) <= 2 * num_fitting + 1  # long shots that do not fit are hardly encoded
    assert len(set(checked)) == len(checked)


async def test_a_labelled_set_shows_each_label_unless_a_strategy_is_named(
    http: httpx.AsyncClient, support_sets: SupportSets
) -> None:
    """The first examples of a set that was made of a folder all have the first label."""
    examples = [NewExample(id=str(number), media=(IMAGES[0],), label=label) for number, label in enumerate("aaabbccdd")]
    await support_sets.create("letters", examples)
    for selection, labels in (({}, set("abcd")), ({"k": 2, "strategy": "first"}, {"a"})):
        body = await complete(http, examples={"support_set": "letters", **selection})
        assert {shot["label"] for shot in body["fewshot"]["shots"]} == labels
        assert body["fewshot"]["strategy"] == selection.get("strategy", "balanced")


async def test_each_model_family_has_its_own_templates(client: FakeClient, settings: Settings) -> None:
    client.answer = " a cat"
    app = application(client, settings, CONFIGS["flamingo"])
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://localhost", event_hooks=CHECKED
    ) as http:
        body = await complete(http, shots=SHOTS[:1])
    await app.state.services.decoder.stop()
    expected: list[Segment] = [
        Media(IMAGES[0].digest),
        Text("Output: warm"),
        END,
        Media(QUERY.digest),
        Text("Output:"),
    ]
    assert client.requests[0].prompt.token_ids == token_ids(*expected)
    assert body["choices"][0]["text"] == "a cat"
