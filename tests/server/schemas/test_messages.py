"""A refused value is answered in this server's words, which say what the value must be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.errors import InvalidRequest, UnsupportedParameter
from server.schemas.base import ListRequest, Schema, read
from server.schemas.decisions import DecisionRequest
from server.schemas.fewshot import ClassifyRequest
from server.schemas.generation import ChatRequest, CompletionRequest
from server.schemas.keys import CreateKeyRequest
from server.schemas.models import EmbeddingsRequest
from server.schemas.stored import CreateRequest

USER = {"role": "user", "content": "x"}
IDS = "list of token ids"
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("schema", "body", "message"),
    [
        (CompletionRequest, {}, "prompt: is required, but missing or null"),
        (CompletionRequest, {"prompt": "x", "max_tokens": "3"}, "max_tokens: must be an integer"),
        (CompletionRequest, {"prompt": "x", "stop": [""]}, "stop[0]: must have at least 1 character"),
        (CompletionRequest, {"prompt": "x", "stop": ["a"] * 17}, "stop: must have at most 16 entries"),
        (CompletionRequest, {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias.1: must be at most 100"),
        (ChatRequest, {"messages": []}, "messages: must have at least 1 entry"),
        (
            CreateKeyRequest,
            {"name": "a\nb"},
            "name: must be a text without control characters, such as line breaks, and without invisible ones",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content: is required, but missing or null",
        ),
        (
            ChatRequest,
            {"messages": [USER | {"content": [IMAGE | {"image_url": "data:,"}]}]},
            'messages[0].content[0].image_url: must be an object such as {"url": "data:image/…"}',
        ),
        (EmbeddingsRequest, {"input": ["x", IMAGE]}, "input: texts and media cannot be in one request"),
        (
            DecisionRequest,
            {"input": [{"content": "x"}]},
            "input[0].role: is required, one of 'user', 'system', 'developer', 'assistant'",
        ),
        (
            DecisionRequest,
            {"input": ["x"]},
            "input[0]: must be an object whose role is one of 'user', 'system', 'developer', 'assistant'",
        ),
        (ListRequest, {"limit": "9" * 5000}, "limit: must be an integer"),
        (
            CompletionRequest,
            {"prompt": "x", "structured_outputs": {"json": 5}},
            "structured_outputs.json: must be a string or object",
        ),
        (CompletionRequest, {"prompt": "x", "stop": 5}, "stop: must be a string or list"),
        (CompletionRequest, {"prompt": 5}, f"prompt: must be a string, {IDS}, list of parts or list of prompts"),
        (CompletionRequest, {"prompt": {}}, f"prompt: must be a string, {IDS}, list of parts or list of prompts"),
        (CompletionRequest, {"prompt": ["x", ["y"]]}, f"prompt[1]: must be a string, {IDS} or list of parts"),
        (
            EmbeddingsRequest,
            {"input": 5},
            f"input: must be a string, list of strings, {IDS}, list of lists of token ids or list of parts",
        ),
        (ChatRequest, {"messages": [USER | {"content": {}}]}, "messages[0].content: must be a string or list"),
        (ChatRequest, {"messages": [USER | {"content": 5}]}, "messages[0].content: must be a string or list"),
        (DecisionRequest, {"input": 5}, "input: must be a string or list"),
        (ClassifyRequest, {"query": {"text": "x"}, "template": 3}, "template: must be a string or object"),
    ],
)
def test_a_wrong_value_is_answered_with_what_it_must_be(
    schema: type[Schema], body: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read(schema, json.dumps(body).encode())
    assert (refusal.value.message, refusal.value.code) == (message, "invalid_value")


def json_of_decision(data: object) -> dict[str, Any]:
    message = {"role": "user", "content": [{"type": "input_json", "data": data}]}
    return {"input": [message], "questions": [{"type": "predicate", "instructions": "x"}]}


NUMBER = {"enum": [[0.5]]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": NUMBER}}
TOOL = {"type": "function", "function": {"name": "x", "parameters": NUMBER}}


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "Infinity"])
@pytest.mark.parametrize(
    ("schema", "body", "field"),
    [
        (CompletionRequest, {"prompt": "x", "structured_outputs": {"json": NUMBER}}, "structured_outputs.json"),
        (ChatRequest, {"messages": [USER], "response_format": FORMAT}, "response_format.json_schema.schema"),
        (ChatRequest, {"messages": [USER], "tools": [TOOL]}, "tools[0].function.parameters"),
        (DecisionRequest, json_of_decision(NUMBER), "input[0].content[0].data"),
        (DecisionRequest, json_of_decision([NUMBER]), "input[0].content[0].data[0]"),
        (CreateRequest, {"examples": [{"text": "x", "metadata": NUMBER}]}, "examples[0].metadata"),
    ],
)
def test_a_number_of_json_that_is_not_finite_is_refused(
    schema: type[Schema], body: dict[str, Any], field: str, number: str
) -> None:
    text = json.dumps(body)
    read(schema, text.encode())
    with pytest.raises(InvalidRequest) as refusal:
        read(schema, text.replace("0.5", number).encode())
    assert refusal.value.message == f"{field}: may not contain numbers that are not finite"
    read(schema, text.replace("0.5", "-" + "9" * 300).encode())
    with pytest.raises(InvalidRequest) as refusal:
        read(schema, text.replace("0.5", "-1" + "0" * 300).encode())
    assert refusal.value.message == f"{field}: may not contain integers of more than 300 digits"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "messages",
            [USER, {"role": "assistant", "content": [IMAGE]}],
            "messages[1].content[0]: this message has only text; images and videos belong to user messages",
        ),
        ("store", True, "store: only false is supported"),
        ("service_tier", "flex", 'service_tier: only "auto" or "default" is supported'),
        ("reasoning_effort", "low", 'reasoning_effort: only "none" is supported'),
        (
            "chat_template_kwargs",
            {"enable_thinking": True},
            "chat_template_kwargs.enable_thinking: only false is supported",
        ),
    ],
)
def test_a_value_other_than_the_supported_ones_is_refused_with_these(field: str, value: object, message: str) -> None:
    with pytest.raises(UnsupportedParameter) as refusal:
        read(ChatRequest, json.dumps({"messages": [USER]} | {field: value}).encode())
    assert refusal.value.message == message


@pytest.mark.parametrize("item", [{"type": "input_text", "text": "x"}, {"type": "function_call", "name": "f"}])
def test_an_item_of_a_decision_that_is_no_message_is_refused(item: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter) as refusal:
        read(DecisionRequest, json.dumps({"input": [item], "questions": []}).encode())
    assert refusal.value.message == "input[0]: only messages are supported, which have a role and a content"


@pytest.mark.parametrize(
    ("schema", "body", "message"),
    [
        (ChatRequest, {"functions": []}, "unknown parameter functions; did you mean tools?"),
        (
            CompletionRequest,
            {"max_completion_tokens": 1},
            "unknown parameter max_completion_tokens; did you mean max_tokens?",
        ),
        (
            CompletionRequest,
            {"structured_outputs": {"grammar": "x"}},
            "unknown parameter structured_outputs.grammar; describe the answer with json, regex or choice",
        ),
        (
            EmbeddingsRequest,
            {"input": "x", "dimensions": 3},
            "unknown parameter dimensions; the model determines the number of dimensions",
        ),
        (
            ChatRequest,
            {"messages": [USER | {"images": []}]},
            "unknown parameter messages[0].images; an image is a part of type image_url",
        ),
    ],
)
def test_a_field_of_another_server_is_refused_with_what_to_use(
    schema: type[Schema], body: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedParameter) as refusal:
        read(schema, json.dumps(body).encode())
    assert refusal.value.message == message


@pytest.mark.parametrize(
    ("schema", "body", "message"),
    [
        (CompletionRequest, {"NAME": 1}, "unknown parameter NAME"),
        (EmbeddingsRequest, {"input": [{"type": "text", "text": "x", "NAME": 1}]}, "unknown parameter input[0].NAME"),
        (CompletionRequest, {"prompt": "x", "logit_bias": {"NAME": "x"}}, "logit_bias.NAME: must be a number"),
    ],
)
def test_a_name_of_a_client_is_cut_in_a_message(schema: type[Schema], body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read(schema, json.dumps(body).replace("NAME", "n" * 1000).encode())
    assert refusal.value.message == message.replace("NAME", "n" * 64)
    assert str(refusal.value.param) in refusal.value.message
