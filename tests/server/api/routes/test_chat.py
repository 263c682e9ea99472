"""POST /v1/chat/completions as clients see it: responses, streams and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.errors import EngineDied
from server.media.source import encoded
from server.wire import Grammar
from tests.server.conftest import data_url, image_part, png
from tests.server.fakes import TOKENIZER, FakeClient

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "Name:"}]


async def post(http: httpx.AsyncClient, **fields: object) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})


async def chat(http: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await post(http, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def stream(http: httpx.AsyncClient, **fields: object) -> list[Any]:
    response = await post(http, stream=True, **fields)
    assert response.status_code == 200, response.text
    *lines, done = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def joined(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"]["content"] for choice in choices)


async def test_a_chat_completion_has_openais_shape(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.answer = " a cat"
    body = await chat(http, model="tiny")
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    usage = body.pop("usage")
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 7, 12)
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a cat", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }
    assert client.requests[0].prompt.token_ids == TOKENIZER.encode_plain("Name:")


async def test_turns_become_shots(http: httpx.AsyncClient, client: FakeClient) -> None:
    red, blue = png("red"), png("blue")
    hint = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    first = {"type": "image_url", "image_url": {"url": data_url(red), "detail": "original"}, **hint}
    messages = [
        {"role": "user", "content": [first, {"type": "text", "text": "a", **hint}]},
        {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "c"}, image_part(blue)]},
    ]
    body = await chat(http, messages=messages, return_token_ids=True)
    image, end = TOKENIZER.media_token_id, TOKENIZER.id_of("<|endofchunk|>")
    ids = [image, *TOKENIZER.encode_plain("a b"), end, image, *TOKENIZER.encode_plain("c")]
    assert body["choices"][0]["prompt_token_ids"] == client.requests[0].prompt.token_ids == ids
    assert client.requests[0].prompt.media == [encoded(red, "image", "").digest, encoded(blue, "image", "").digest]
    assert body["usage"]["fewshot_details"]["media"] == 2


async def test_a_stream_begins_with_the_role_and_has_the_same_text(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.answer = " a cat"
    role, *rest, usage = await stream(http, stream_options={"include_usage": True})
    assert role["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert joined(rest) == "a cat"
    assert all(chunk["choices"][0]["delta"].keys() == {"content"} for chunk in rest)
    assert [chunk["choices"][0]["finish_reason"] for chunk in rest] == [None] * 6 + ["stop"]
    assert {chunk["object"] for chunk in [role, *rest, usage]} == {"chat.completion.chunk"}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 7


async def test_each_of_several_answers_loses_the_lead_once(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.answer = "  a cat"
    body = await chat(http, n=2)
    assert [choice["message"]["content"] for choice in body["choices"]] == [" a cat"] * 2
    chunks = await stream(http, n=2)
    assert [joined(chunks, index) for index in range(2)] == [" a cat"] * 2


async def test_an_answer_keeps_a_space_that_is_not_the_templates(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.answer = " a cat"
    body = await chat(http, messages=[{"role": "user", "content": "Name: "}])
    assert body["choices"][0]["message"]["content"] == " a cat"


async def test_log_probabilities_are_a_list_of_tokens(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.answer = "aé"
    choice = (await chat(http, logprobs=True, top_logprobs=1))["choices"][0]
    first, half, *_ = choice["logprobs"]["content"]
    assert first == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
    }
    assert half["bytes"] is None
    choice = (await chat(http, logprobs=True))["choices"][0]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []
    (chunk, *_) = [c for c in await stream(http, logprobs=True) if c["choices"][0]["logprobs"]]
    assert chunk["choices"][0]["logprobs"]["content"][0]["token"] == "a"


@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 7}, 7),
        ({"max_tokens": 7, "max_completion_tokens": 7}, 7),
        ({}, 64 - 5),  # the default, limited by the model's context
    ],
)
async def test_max_tokens_has_two_names(
    http: httpx.AsyncClient, client: FakeClient, fields: dict[str, int], max_tokens: int
) -> None:
    await chat(http, **fields)
    assert client.requests[0].sampling.max_tokens == max_tokens


@pytest.mark.parametrize("top_p", [0, 0.9])
async def test_sampling_fields_reach_the_engine(http: httpx.AsyncClient, client: FakeClient, top_p: float) -> None:
    fields = {"temperature": 0.5, "top_p": top_p, "seed": 7, "presence_penalty": 1.0, "ignore_eos": True}
    await chat(http, stop=["x"], user="me", **fields)
    sampling = client.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields


SCHEMA = {"type": "object", "properties": {"animal": {"type": "string"}}}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        (
            {"response_format": {"type": "json_object"}},
            Grammar(kind="json", text='{"type":"object"}', field="response_format"),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            Grammar(
                kind="json",
                text=json.dumps(SCHEMA, separators=(",", ":")),
                field="response_format.json_schema.schema",
            ),
        ),
        # the model also writes the space between question and answer, which is not in the choices of the request
        ({"structured_outputs": {"choice": ["cat", "dog"]}}, Grammar(kind="choice", choices=(" cat", " dog"))),
    ],
)
async def test_a_grammar_reaches_the_engine(
    http: httpx.AsyncClient, client: FakeClient, fields: dict[str, Any], grammar: Grammar | None
) -> None:
    await chat(http, **fields)
    assert client.requests[0].sampling.grammar == grammar


CALL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "g"}}
ARGUMENTS = "tools[0].function.parameters"
NO_SCHEMA = {"type": "object", "properties": {"animal": {"type": "cat"}}}
TOO_LARGE = {"type": "object", "properties": {"animal": {"const": "x" * 2**17}}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(("choice", "reason"), [(named("f"), "stop"), ("required", "tool_calls")])
async def test_a_named_function_is_called(
    http: httpx.AsyncClient, client: FakeClient, choice: Any, reason: str
) -> None:
    client.answer = '{"animal":"a cat"}'
    (answer,) = (await chat(http, tools=[CALL], tool_choice=choice, max_tokens=40))["choices"]
    assert answer["finish_reason"] == reason
    (call,) = answer["message"].pop("tool_calls")
    assert answer["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "f", "arguments": client.answer}}
    text = json.dumps(SCHEMA, separators=(",", ":"))
    assert client.requests[0].sampling.grammar == Grammar(kind="json", text=text, field=ARGUMENTS)


async def test_a_function_without_parameters_takes_an_object(http: httpx.AsyncClient, client: FakeClient) -> None:
    await chat(http, tools=[named("f"), OTHER], tool_choice=named("f"))
    assert client.requests[0].sampling.grammar == Grammar(kind="json", text='{"type":"object"}', field=ARGUMENTS)


@pytest.mark.parametrize("parameters", [{}, {"properties": {}}, {"type": "object", "properties": {}}])
async def test_the_arguments_of_a_function_are_an_object(
    http: httpx.AsyncClient, client: FakeClient, parameters: dict[str, Any]
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    await chat(http, tools=[tool], tool_choice="required")
    grammar = client.requests[0].sampling.grammar
    assert grammar is not None
    assert json.loads(grammar.text) == {"type": "object", **parameters}


async def test_a_call_and_its_result_are_sent_back(http: httpx.AsyncClient, client: FakeClient) -> None:
    (answer,) = (await chat(http, tools=[CALL], tool_choice="required"))["choices"]
    (call,) = answer["message"]["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "5 kg"}
    await chat(http, messages=[*MESSAGES, answer["message"], result], tools=[CALL])
    text = f"Name:\n{call['function']['arguments']}\n5 kg"
    assert client.requests[1].prompt.token_ids == TOKENIZER.encode_plain(text)


async def test_a_call_that_is_cut_ends_for_its_length(http: httpx.AsyncClient, client: FakeClient) -> None:
    (answer,) = (await chat(http, tools=[CALL], tool_choice="required", max_tokens=1))["choices"]
    assert answer["finish_reason"] == "length"
    last = (await stream(http, tools=[CALL], tool_choice="required", max_tokens=40))[-1]
    assert last["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_call_streams_its_arguments(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.answer = '{"animal":"a cat"}'
    chunks = await stream(http, tools=[CALL], tool_choice=named("f"), max_tokens=40)
    (first, *rest) = [chunk["choices"][0]["delta"] for chunk in chunks]
    (begun,) = first["tool_calls"]
    assert (first["role"], first["content"], begun["function"]) == ("assistant", None, {"name": "f", "arguments": ""})
    assert "".join(delta["tool_calls"][0]["function"]["arguments"] for delta in rest) == client.answer
    assert {delta["tool_calls"][0]["index"] for delta in [first, *rest]} == {0}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [CALL], "tool_choice": "none"},
        {"tools": [CALL, OTHER], "tool_choice": "auto"},
        {"tools": [CALL]},
        {"metadata": {"trace": "x"}, "stream_options": {"include_obfuscation": False}},
        {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
        {"add_generation_prompt": True, "continue_final_message": False},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "{}", "parsed": {"a": 1}}, *MESSAGES]},
        {"tools": [], "tool_choice": "auto"},
        {"metadata": {}, "service_tier": "auto", "reasoning_effort": "none", "verbosity": "medium"},
        {"metadata": None, "service_tier": None, "reasoning_effort": None, "chat_template_kwargs": None},
        {"parallel_tool_calls": False, "prompt_cache_key": "x", "safety_identifier": "y", "chat_template_kwargs": {}},
    ],
)
async def test_values_that_ask_for_what_is_done_anyway_are_accepted(
    http: httpx.AsyncClient, client: FakeClient, fields: dict[str, Any]
) -> None:
    (answer,) = (await chat(http, **fields))["choices"]
    assert answer["message"]["content"] == "a cat"
    assert client.requests[0].sampling.grammar is None


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"tools": [CALL, OTHER], "tool_choice": "required"}, 422, "tool_choice"),
        ({"tools": [OTHER, CALL, named("f")]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            400,
            "tools[0].function.parameters",
        ),
        ({"tools": [CALL], "tool_choice": named("g")}, 400, "tool_choice.function.name"),
        ({"tools": [CALL], "tool_choice": named("f"), "stop": "a"}, 400, "stop"),
        ({"tools": [CALL], "tool_choice": named("f"), "response_format": {"type": "json_object"}}, 400, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, 422, "tools[0].custom"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"metadata": {str(number): "" for number in range(17)}}, 400, "metadata"),
        ({"stream_options": {"include_obfuscation": True}}, 422, "stream_options.include_obfuscation"),
        ({"add_generation_prompt": False}, 422, "add_generation_prompt"),
        ({"continue_final_message": True}, 422, "continue_final_message"),
        ({"service_tier": "flex"}, 422, "service_tier"),
        ({"reasoning_effort": "high"}, 422, "reasoning_effort"),
        ({"verbosity": "low"}, 422, "verbosity"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, 422, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"date": "today"}}, 422, "chat_template_kwargs.date"),
        ({"audio": {"voice": "x"}}, 422, "audio"),
        ({"modalities": ["text", "audio"]}, 422, "modalities[1]"),
        ({"store": True}, 422, "store"),
        ({"echo": True}, 422, "echo"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [*MESSAGES, {"role": "tool", "content": "x"}]}, 400, "messages[1].tool_call_id"),
        (
            {"messages": [*MESSAGES, {"role": "tool", "content": "x", "tool_call_id": "y"}]},
            400,
            "messages[1].tool_call_id",
        ),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": None}]}, 400, "messages[1]"),
        ({"messages": [{"role": "function", "content": "x"}]}, 422, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "y" * 65}]}, 400, "messages[0].name"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y", "name": "z"}]}, 422, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 422, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "system", "content": [image_part()]}, *MESSAGES]},
            422,
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [image_part(b"")]}]}, 400, "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": [image_part()] * 4}]}, 400, "messages"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_completion_tokens"),
        ({"max_tokens": 100}, 400, "max_tokens"),
        ({"top_logprobs": 1}, 400, "top_logprobs"),
        ({"logprobs": 1}, 400, "logprobs"),
        ({"response_format": {"type": "xml"}}, 422, "response_format.type"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "x"}},
            400,
            "response_format",
        ),
        ({"template": "chatml"}, 400, "template"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]},
            400,
            "messages[0].content[0].image_url",
        ),
        ({"model": "other"}, 404, "model"),
    ],
)
async def test_an_error_names_the_invalid_or_unsupported_field(
    http: httpx.AsyncClient, client: FakeClient, fields: dict[str, Any], status: int, param: str | None
) -> None:
    response = await post(http, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert client.requests == []


@pytest.mark.parametrize("schema", [NO_SCHEMA, TOO_LARGE])
@pytest.mark.parametrize(
    ("form", "param"),
    [
        (lambda schema: {"structured_outputs": {"json": schema}}, "structured_outputs"),
        (
            lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            "response_format.json_schema.schema",
        ),
        (
            lambda schema: {
                "tools": [OTHER, {"type": "function", "function": {"name": "f", "parameters": schema}}],
                "tool_choice": named("f"),
            },
            "tools[1].function.parameters",
        ),
    ],
)
async def test_an_error_of_a_schema_names_the_field_that_has_it(
    http: httpx.AsyncClient, form: Callable[[Any], dict[str, Any]], param: str, schema: Any
) -> None:
    response = await post(http, **form(schema))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param}: ")


async def test_a_form_without_a_schema_is_named_as_it_was_sent(http: httpx.AsyncClient) -> None:
    response = await post(http, response_format={"type": "json_object"}, use_beam_search=True)
    assert (response.status_code, response.json()["error"]["param"]) == (422, "response_format")


async def test_an_error_before_the_first_token_is_a_status_and_after_it_an_event(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    async def fail(index: int) -> None:
        if index == failing_index:
            raise EngineDied("died")

    client.before, failing_index = fail, 0
    assert (await post(http, stream=True)).status_code == 503
    failing_index = 2
    *chunks, error = await stream(http)
    assert joined(chunks) == "a "
    assert error == EngineDied("died").body()
