"""POST /v1/completions refuses invalid requests with a status, a code and the path of the invalid field."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from typing import Any
from unittest.mock import create_autospec

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import spelling
from server.api.generation import completion_requests
from server.errors import InvalidRequest, MediaNotFound, UnsupportedParameter
from server.media.intake import Intake
from server.media.pool import DecodePool
from server.media.store import MediaStore
from server.prompt import prepare_prompt, prepare_prompts
from server.schemas import base
from server.schemas.base import Schema, read
from server.schemas.fewshot import ClassifyRequest
from server.schemas.generation import CompletionRequest
from server.settings import Settings
from tests.server.conftest import data_url, image_part
from tests.server.fakes import AS_JSON, CONFIG, TOKENIZER, FakeClient, served_model
from tests.tiny_models import prompt_tokenizer

pytestmark = pytest.mark.anyio
INTAKE = Intake(Settings(), MediaStore("memory://nothing"), create_autospec(DecodePool))
LAST_ID = CONFIG.language_model.num_token_ids - 1


def url_part(url: str, kind: str = "image_url") -> list[dict[str, object]]:
    return [{"type": kind, kind: {"url": url}}]


BAD: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("no prompt", {}, 400, "invalid_value", "prompt"),
    ("prompt of a wrong type", {"prompt": 3}, 400, "invalid_value", "prompt"),
    ("empty text", {"prompt": ""}, 400, "invalid_value", "prompt"),
    ("no parts", {"prompt": []}, 400, "invalid_value", "prompt"),
    ("unknown field", {"prompt": "x", "tempratur": 1}, 422, "unsupported_parameter", "tempratur"),
    ("unknown option", {"prompt": "x", "stream_options": {"x": 1}}, 422, "unsupported_parameter", "stream_options.x"),
    ("number as text", {"prompt": "x", "max_tokens": "3"}, 400, "invalid_value", "max_tokens"),
    ("negative max_tokens", {"prompt": "x", "max_tokens": -1}, 400, "invalid_value", "max_tokens"),
    ("too many tokens", {"prompt": "x", "max_tokens": 64}, 400, "context_length_exceeded", "max_tokens"),
    ("too long a prompt", {"prompt": "x" * 65}, 400, "context_length_exceeded", "prompt"),
    ("min above max", {"prompt": "x", "min_tokens": 9, "max_tokens": 8}, 400, "invalid_value", "min_tokens"),
    ("negative temperature", {"prompt": "x", "temperature": -0.1}, 400, "invalid_value", "temperature"),
    ("NaN", {"prompt": "x", "temperature": float("nan")}, 400, "invalid_value", "temperature"),
    ("infinity", {"prompt": "x", "repetition_penalty": float("inf")}, 400, "invalid_value", "repetition_penalty"),
    ("negative top_p", {"prompt": "x", "top_p": -0.1}, 400, "invalid_value", "top_p"),
    ("top_k -2", {"prompt": "x", "top_k": -2}, 400, "invalid_value", "top_k"),
    ("min_p 2", {"prompt": "x", "min_p": 2}, 400, "invalid_value", "min_p"),
    ("penalty", {"prompt": "x", "presence_penalty": 3}, 400, "invalid_value", "presence_penalty"),
    ("bias on text", {"prompt": "x", "logit_bias": {"a": 1}}, 400, "invalid_value", "logit_bias"),
    ("bias by a second name", {"prompt": "x", "logit_bias": {"1": 1, "01": 2}}, 400, "invalid_value", "logit_bias"),
    ("bias too far", {"prompt": "x", "logit_bias": {"1": 101}}, 400, "invalid_value", "logit_bias.1"),
    ("bias beyond", {"prompt": "x", "logit_bias": {"99999": 1}}, 400, "invalid_value", "logit_bias"),
    ("stop id beyond", {"prompt": "x", "stop_token_ids": [1, 99999]}, 400, "invalid_value", "stop_token_ids[1]"),
    ("empty stop", {"prompt": "x", "stop": [""]}, 400, "invalid_value", "stop[0]"),
    ("many stops", {"prompt": "x", "stop": ["a"] * 17}, 400, "invalid_value", "stop"),
    ("logprobs", {"prompt": "x", "logprobs": 21}, 400, "invalid_value", "logprobs"),
    ("seed", {"prompt": "x", "seed": 2**63}, 400, "invalid_value", "seed"),
    ("n", {"prompt": "x", "n": 17}, 400, "invalid_value", "n"),
    ("best_of alone", {"prompt": "x", "best_of": 2}, 422, "unsupported_parameter", "best_of"),
    ("few beams", {"prompt": "x", "n": 3, "best_of": 2, "use_beam_search": True}, 400, "invalid_value", "best_of"),
    *(
        (
            f"beams with {name}",
            {"prompt": "x", "use_beam_search": True, name: value},
            422,
            "unsupported_parameter",
            name,
        )
        for name, value in {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "presence_penalty": 1,
            "frequency_penalty": 1,
            "repetition_penalty": 1.2,
            "logit_bias": {"1": 1},
        }.items()
    ),
    ("length without beams", {"prompt": "x", "length_penalty": 2}, 422, "unsupported_parameter", "length_penalty"),
    ("stopping, no beams", {"prompt": "x", "early_stopping": True}, 422, "unsupported_parameter", "early_stopping"),
    (
        "two forms",
        {"prompt": "x", "structured_outputs": {"choice": ["a"], "regex": "a"}},
        400,
        "invalid_value",
        "structured_outputs",
    ),
    ("bad regex", {"prompt": "x", "structured_outputs": {"regex": "a("}}, 400, "invalid_value", "structured_outputs"),
    ("bad schema", {"prompt": "x", "structured_outputs": {"json": "{"}}, 400, "invalid_value", "structured_outputs"),
    (
        "large schema",
        {"prompt": "x", "structured_outputs": {"json": {"enum": [f"value {i}" for i in range(12000)]}}},
        400,
        "invalid_value",
        "structured_outputs",
    ),
    (
        "large choice",
        {"prompt": "x", "structured_outputs": {"choice": ["c" * 1024] * 129}},
        400,
        "invalid_value",
        "structured_outputs",
    ),
    ("no choice", {"prompt": "x", "structured_outputs": {"choice": []}}, 400, "invalid_value", "structured_outputs"),
    (
        "form of beams",
        {"prompt": "x", "use_beam_search": True, "structured_outputs": {"regex": "a"}},
        422,
        "unsupported_parameter",
        "structured_outputs",
    ),
    ("request id", {"prompt": "x", "request_id": "a b"}, 400, "invalid_value", "request_id"),
    ("request id not in ASCII", {"prompt": "x", "request_id": "ä"}, 400, "invalid_value", "request_id"),
    ("token beyond", {"prompt": [1, LAST_ID + 1]}, 400, "invalid_value", "prompt[1]"),
    ("negative token", {"prompt": [1, -1]}, 400, "invalid_value", "prompt[1]"),
    ("media token, no media", {"prompt": [TOKENIZER.media_token_id]}, 400, "invalid_value", "prompt"),
    ("too long a second prompt", {"prompt": ["a", "b" * 65]}, 400, "context_length_exceeded", "prompt[1]"),
    ("mixed", {"prompt": [1, "a"]}, 400, "invalid_value", "prompt[1]"),
    ("text before a part", {"prompt": ["a", {"type": "text", "text": "b"}]}, 400, "invalid_value", "prompt[0]"),
    ("part without a type", {"prompt": [{"text": "x"}]}, 400, "invalid_value", "prompt[0].type"),
    ("part whose type is null", {"prompt": [{"type": None, "text": "x"}]}, 400, "invalid_value", "prompt[0].type"),
    ("part of an unknown type", {"prompt": [{"type": "txt"}]}, 422, "unsupported_parameter", "prompt[0].type"),
    ("part that is no object", {"prompt": [{"type": "text", "text": "x"}, 3]}, 400, "invalid_value", "prompt[1]"),
    (
        "image_id",
        {"prompt": [{"type": "text", "text": "x"}, {"type": "image_id", "image_id": "img_1"}]},
        404,
        "image_not_found",
        "prompt[1].image_id",
    ),
    ("http", {"prompt": url_part("https://a/b.png")}, 422, "unsupported_parameter", "prompt[0].image_url.url"),
    (
        "video by http",
        {"prompt": url_part("http://a/b", "video_url")},
        422,
        "unsupported_parameter",
        "prompt[0].video_url.url",
    ),
    ("file", {"prompt": url_part("file:///etc/passwd")}, 400, "invalid_value", "prompt[0].image_url.url"),
    ("path", {"prompt": url_part("/etc/passwd")}, 400, "invalid_value", "prompt[0].image_url.url"),
    ("not base64", {"prompt": url_part("data:image/png,abc")}, 400, "invalid_value", "prompt[0].image_url.url"),
    (
        "broken base64",
        {"prompt": url_part("data:image/png;base64,a$==")},
        400,
        "invalid_media",
        "prompt[0].image_url.url",
    ),
    (
        "unpadded base64",
        {"prompt": url_part("data:image/png;base64,YQ")},
        400,
        "invalid_media",
        "prompt[0].image_url.url",
    ),
    ("no bytes", {"prompt": url_part("data:image/png;base64,")}, 400, "invalid_media", "prompt[0].image_url.url"),
    (
        "text as image",
        {"prompt": url_part(data_url(b"x", "text/html"))},
        400,
        "invalid_value",
        "prompt[0].image_url.url",
    ),
    ("large media", {"prompt": url_part(data_url(b"x" * 131_080))}, 400, "invalid_media", "prompt[0].image_url.url"),
    ("many media", {"prompt": [image_part()] * 4}, 400, "invalid_value", "prompt"),
]


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
async def test_an_error_names_the_invalid_field(
    http: httpx.AsyncClient, client: FakeClient, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    # json.dumps, unlike httpx, writes NaN as some clients do
    response = await http.post("/v1/completions", content=json.dumps(fields), headers=AS_JSON)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["message"]
    assert client.requests == []


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"text": "x"}, "prompt[1].type: is required, one of 'text', "),
        ("x", "prompt[1]: must be an object whose type is one of 'text', "),
        ({"type": "audio"}, "prompt[1].type: no support for audio, only 'text', "),
        ({"type": ""}, "prompt[1].type: no support for '', only 'text', "),
        ({"type": "<text>"}, "prompt[1].type: no support for <text>, only 'text', "),
    ],
)
async def test_a_part_of_no_known_type_is_refused_with_the_known_ones(
    http: httpx.AsyncClient, part: object, message: str
) -> None:
    response = await http.post("/v1/completions", json={"prompt": [{"type": "text", "text": "x"}, part]})
    assert response.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b"\xff", b'{"prompt":"\\ud800"}', b"[" * 10_000])
async def test_a_body_that_is_no_json_object_is_refused(http: httpx.AsyncClient, body: bytes) -> None:
    response = await http.post("/v1/completions", content=body, headers=AS_JSON)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_value"


async def test_a_list_without_parts_is_refused_for_a_family_that_begins_prompts_with_a_marker() -> None:
    model = replace(served_model(), tokenizer=prompt_tokenizer(replace(CONFIG.prompt, begin="</s>")))
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        await prepare_prompt([], model, INTAKE)


async def test_another_model_is_not_found(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={"prompt": "x", "model": "gpt-4"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.sampled_from(["type", "text"]), inner)
    ),
    max_leaves=12,
)
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image_url", "video_url", "end_of_chunk", "image_id"])},
        optional={
            "image_id": JSON,
            "text": JSON,
            "image_url": JSON | st.fixed_dictionaries({"url": st.text() | st.just("data:,")}),
        },
    ),
    max_size=4,
)


@given(
    st.fixed_dictionaries(
        {"prompt": JSON | PARTS | st.lists(st.integers(-2, LAST_ID + 2))},
        optional={name: JSON for name in CompletionRequest.model_fields if name != "prompt"},
    )
)
def test_any_json_is_accepted_or_the_error_names_a_field(body: dict[str, Any]) -> None:
    error = refusal(json.dumps(body).encode())
    if error is not None and error.param is not None:
        assert re.split(r"[.\[]", error.param)[0] in body


def refusal(body: bytes) -> InvalidRequest | MediaNotFound | None:
    try:
        fields = read(CompletionRequest, body)
        prompts = asyncio.run(prepare_prompts(fields.prompt, served_model(), INTAKE))
        completion_requests(fields, prompts, served_model())
    except (InvalidRequest, MediaNotFound) as error:
        return error
    return None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", 101, "temperature: must be at least 0 and at most 100"),
        ("repetition_penalty", 0, "repetition_penalty: must be above 0 and at most 100"),
        ("timeout", 0, "timeout: must be above 0 and at most 86400"),
        ("seed", 2**63, f"seed: must be at least {-(2**63)} and at most {2**63 - 1}"),
        ("logprobs", 21, "logprobs: must be at least 0 and at most 20"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(field: str, value: float, message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read(CompletionRequest, json.dumps({"prompt": "x", field: value}).encode())
    assert (refusal.value.message, refusal.value.param) == (message, field)


SHOT = {"text": "a"}
QUERY = {"query": {"image": "img_1"}}


@pytest.mark.parametrize(
    ("schema", "body", "message"),
    [
        (ClassifyRequest, QUERY | {"example": {}}, "unknown parameter example; did you mean examples?"),
        (
            ClassifyRequest,
            QUERY | {"support_set": "a"},
            "unknown parameter support_set; did you mean examples.support_set?",
        ),
        (ClassifyRequest, QUERY | {"labels": ["a"]}, "unknown parameter labels; did you mean candidates?"),
        (CompletionRequest, {"guided_json": {}}, "unknown parameter guided_json; did you mean structured_outputs?"),
        (ClassifyRequest, QUERY | {"image": "a"}, "unknown parameter image; did you mean query.image?"),
        (
            ClassifyRequest,
            QUERY | {"shots": [SHOT | {"lable": "a"}]},
            "unknown parameter shots[0].lable; did you mean label?",
        ),
        (
            ClassifyRequest,
            QUERY | {"shots": [{"anser": "a"}]},
            "unknown parameter shots[0].anser; did you mean answer?",
        ),
        (
            ClassifyRequest,
            QUERY | {"shots": [{"images": "a"}]},
            "unknown parameter shots[0].images; did you mean image?",
        ),
        (
            CompletionRequest,
            {"prompt": "x", "structured_outputs": {"jsn": {}}},
            "unknown parameter structured_outputs.jsn; did you mean json?",
        ),
        (ClassifyRequest, QUERY | {"zzz": 1, "priority": "high"}, "unknown parameter zzz"),
        (ClassifyRequest, QUERY | {"": 1}, "unknown parameter "),
        (ClassifyRequest, QUERY | {"<exampl>": 1}, "unknown parameter <exampl>; did you mean examples?"),
        (ClassifyRequest, QUERY | {"examples" + "s" * 1000: 1}, "unknown parameter examples" + "s" * 56),
    ],
)
def test_an_unknown_field_is_refused_with_the_name_that_is_close_to_it(
    schema: type[Schema], body: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedParameter) as refusal:
        read(schema, json.dumps(body).encode())
    assert refusal.value.message == message
    assert refusal.value.param == message.removeprefix("unknown parameter ").partition(";")[0]


def test_one_unknown_field_is_compared_with_the_others_and_only_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing takes a time in proportion to the length; a body may have 65,536 unknown fields, or one of 8 MB."""
    compared: list[str] = []

    def matches(name: str, *arguments: Any, **options: Any) -> list[str]:
        compared.append(name)
        return []

    monkeypatch.setattr(spelling, "get_close_matches", matches)
    with pytest.raises(UnsupportedParameter, match=r"unknown parameter shots\[0\]\.lable"):
        read(ClassifyRequest, json.dumps(QUERY | {"shots": [{"lable" * 1000: "a"}] * 100}).encode())
    assert compared == [("lable" * 1000)[: spelling.MAX_COMPARED]]


@pytest.mark.parametrize(
    "body",
    [
        QUERY | {"foo": None},
        QUERY | {"shots": [{"text": "a", "foo": None}]},
    ],
)
def test_a_null_is_not_given_also_in_an_unknown_field(body: dict[str, Any]) -> None:
    """OpenAI's client sends a message of an answer back with all its fields."""
    read(ClassifyRequest, json.dumps(body).encode())


def test_only_the_first_unknown_field_is_reported_by_our_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception takes ten times as long as pydantic's own error."""
    created: list[str] = []

    class Counted(base.UnknownField):
        def __init__(self, name: str, *fields: Any) -> None:
            super().__init__(name, *fields)
            created.append(name)

    monkeypatch.setattr(base, "UnknownField", Counted)
    for _ in range(2):
        with pytest.raises(UnsupportedParameter, match=r"^unknown parameter shots\[1\]\.lable; did you mean label\?$"):
            read(ClassifyRequest, json.dumps(QUERY | {"shots": [{"text": "a"}, *[{"lable": "a"}] * 100]}).encode())
    assert created == ["lable", "lable"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("examples", 'must be an object such as {"support_set": "birds"}'),
        ("query", "must be an object with fields among image, media, question, text"),
    ],
)
def test_a_value_that_is_no_object_is_refused_with_an_example_or_the_fields_of_one(name: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(ClassifyRequest, json.dumps(QUERY | {name: 3}).encode())
    assert caught.value.param == name
    assert caught.value.message == f"{name}: {message}"
