"""POST /v1/completions as clients see it: responses, streams and errors."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.errors import EngineDied, EngineFailed, InvalidMedia
from server.media.source import encoded
from server.wire import Admitted, Grammar
from tests.server.conftest import data_url, image_part, png
from tests.server.fakes import EOS, TOKENIZER, FakeClient

pytestmark = pytest.mark.anyio


def text_part(text: str) -> dict[str, object]:
    return {"type": "text", "text": text}


async def post(http: httpx.AsyncClient, **fields: object) -> httpx.Response:
    return await http.post("/v1/completions", json=fields)


async def complete(http: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await post(http, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def events(response: httpx.Response) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def stream(http: httpx.AsyncClient, **fields: object) -> list[Any]:
    response = await post(http, stream=True, **fields)
    assert response.status_code == 200, response.text
    return events(response)


def joined(chunks: list[Any]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])


async def test_a_completion_has_openais_shape(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await complete(http, prompt="hello", model="tiny")
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": "a cat", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 6,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 2},
            "fewshot_details": {"media": 0, "media_encoded": 1, "media_cached": 0, "media_deduplicated": 0},
        },
    }
    assert client.requests[0].prompt.token_ids == TOKENIZER.encode_plain("hello")
    assert client.requests[0].sampling.max_tokens == 16


async def test_parts_become_tokens_with_a_media_index_and_equal_images_share_a_digest(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    red, blue = png("red"), png("blue")
    parts = [image_part(red), text_part("a"), {"type": "end_of_chunk"}, image_part(blue), image_part(red)]
    body = await complete(http, prompt=parts, return_token_ids=True)
    image, end = TOKENIZER.media_token_id, TOKENIZER.id_of("<|endofchunk|>")
    assert body["choices"][0]["prompt_token_ids"] == [image, *TOKENIZER.encode_plain("a"), end, image, image]
    assert client.requests[0].prompt.media_index == [0, 0, 0, 1, 2]
    assert client.requests[0].prompt.media == [encoded(data, "image", "").digest for data in (red, blue, red)]
    assert {digest: media.data for digest, media in client.media[0].items()} == {
        encoded(data, "image", "").digest: data for data in (red, blue)
    }
    assert body["usage"]["fewshot_details"] == {
        "media": 3,
        "media_encoded": 1,
        "media_cached": 0,
        "media_deduplicated": 1,
    }


async def test_a_video_is_media_of_another_kind(http: httpx.AsyncClient, client: FakeClient) -> None:
    url = data_url(b"some video", "video/mp4")
    await complete(http, prompt=[{"type": "video_url", "video_url": {"url": url}}, text_part("x")])
    (media,) = client.media[0].values()
    assert (media.kind, media.data) == ("video", b"some video")
    assert media.digest == encoded(b"some video", "video", "").digest != encoded(b"some video", "image", "").digest


async def test_a_prompt_may_be_token_ids(http: httpx.AsyncClient, client: FakeClient) -> None:
    await complete(http, prompt=[5, 6, 7])
    assert client.requests[0].prompt.token_ids == [5, 6, 7]
    assert client.requests[0].prompt.media_index == [-1, -1, -1]


async def test_text_cannot_spell_a_marker(http: httpx.AsyncClient, client: FakeClient) -> None:
    await complete(http, prompt="<image></s>")
    assert TOKENIZER.media_token_id not in client.requests[0].prompt.token_ids
    assert EOS not in client.requests[0].prompt.token_ids


async def test_several_answers_are_several_choices(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await complete(http, prompt="hello", n=3, return_token_ids=True)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(i, "a cat") for i in range(3)]
    assert all(choice["prompt_token_ids"] == TOKENIZER.encode_plain("hello") for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 18
    assert client.requests[0].sampling.n == 3


async def test_several_answers_stream_concurrently(http: httpx.AsyncClient) -> None:
    chunks = await stream(http, prompt="It is ", n=2, echo=True)
    for index in range(2):
        answer = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert joined(answer) == "It is a cat"
        assert answer[-1]["choices"][0]["finish_reason"] == "stop"


async def test_stop_strings_end_answers_and_the_last_one_aborts_the_request(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    body = await complete(http, prompt="x", n=2, stop="c")
    assert [choice["text"] for choice in body["choices"]] == ["a ", "a "]
    # the first answer ends while the second one runs; the end of the second one aborts the request
    assert client.ended == [(client.requests[0].request_id, 0)]
    assert client.aborted == [client.requests[0].request_id]


async def test_answers_that_end_by_themselves_are_not_aborted(http: httpx.AsyncClient, client: FakeClient) -> None:
    await complete(http, prompt="x", n=2, max_tokens=20)
    assert (client.ended, client.aborted) == ([], [])


@pytest.mark.parametrize(
    ("fields", "n", "width"), [({}, 1, 3), ({"n": 4}, 4, 4), ({"n": 2, "best_of": 5}, 2, 5), ({"best_of": 1}, 1, 1)]
)
async def test_beam_search_options_reach_the_engine(
    http: httpx.AsyncClient, client: FakeClient, fields: dict[str, int], n: int, width: int
) -> None:
    await complete(http, prompt="x", use_beam_search=True, length_penalty=0.5, early_stopping=True, **fields)
    sampling = client.requests[0].sampling
    assert (sampling.n, sampling.beam_width, sampling.length_penalty, sampling.early_stopping) == (n, width, 0.5, True)


async def test_a_beam_search_accepts_values_without_effect(http: httpx.AsyncClient, client: FakeClient) -> None:
    shaping = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "logit_bias": {}}
    await complete(http, prompt="x", use_beam_search=True, temperature=0, seed=3, **shaping)
    assert client.requests[0].sampling.beam_width == 3


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        ({"choice": ["cat", "dog"]}, Grammar(kind="choice", choices=("cat", "dog"))),
        ({"regex": "[a-z]+"}, Grammar(kind="regex", text="[a-z]+")),
        ({"json": {"type": "object"}}, Grammar(kind="json", text='{"type":"object"}')),
        ({"json": '{"type": "object"}'}, Grammar(kind="json", text='{"type": "object"}')),
    ],
)
async def test_a_grammar_reaches_the_engine(
    http: httpx.AsyncClient, client: FakeClient, form: dict[str, object], grammar: Grammar
) -> None:
    await complete(http, prompt="x", structured_outputs=form)
    assert client.requests[0].sampling.grammar == grammar


async def test_every_sampling_field_reaches_the_engine(http: httpx.AsyncClient, client: FakeClient) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 7,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.2,
        "seed": 7,
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 1,
    }
    await complete(http, prompt="x", stop_token_ids=[3, 4], logit_bias={"5": -100}, priority=2, **fields)
    request = client.requests[0]
    assert {name: getattr(request.sampling, name) for name in fields} == fields
    assert request.sampling.stop_token_ids == (3, 4)
    assert request.sampling.logit_bias == {5: -100.0}
    assert request.priority == 2


async def test_null_means_the_default(http: httpx.AsyncClient, client: FakeClient) -> None:
    await complete(http, prompt="x", stop=None, logprobs=None, seed=None, max_tokens=None, stream=None, user=None)
    assert client.requests[0].sampling.max_tokens == 16


async def test_a_stream_has_the_same_text_in_pieces(http: httpx.AsyncClient) -> None:
    chunks = await stream(http, prompt="hello", stream_options={"include_usage": True}, return_token_ids=True)
    *pieces, usage = chunks
    assert joined(pieces) == "a cat"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in pieces] == [None] * 5 + ["stop"]
    ids = [token_id for chunk in pieces for token_id in chunk["choices"][0]["token_ids"]]
    assert ids == [*TOKENIZER.encode_plain("a cat"), EOS]
    assert [chunk["choices"][0]["prompt_token_ids"] is None for chunk in pieces] == [False, *[True] * 5]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in pieces)


async def test_continuous_usage_is_in_each_chunk_if_requested(http: httpx.AsyncClient) -> None:
    chunks = await stream(http, prompt="hello", stream_options={"continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 6]


async def test_a_stream_disables_caching_and_proxy_buffering(http: httpx.AsyncClient) -> None:
    response = await post(http, prompt="x", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


async def test_a_stop_string_ends_the_text_and_aborts_the_request(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.answer = "a cat\nQ: next"
    body = await complete(http, prompt="x", stop=["\nQ", "zzz"], max_tokens=20)
    assert body["choices"][0] | {"logprobs": 0} == {"index": 0, "text": "a cat", "logprobs": 0, "finish_reason": "stop"}
    assert body["usage"]["completion_tokens"] == len("a cat\nQ")
    assert len(client.aborted) == 1


async def test_the_usage_has_the_tokens_that_were_proposed(http: httpx.AsyncClient, client: FakeClient) -> None:
    assert "completion_tokens_details" not in (await complete(http, prompt="x"))["usage"]
    client.proposals = {1: (True, 0), 2: (True, 0), 3: (False, 2)}
    usage = (await complete(http, prompt="x"))["usage"]
    assert usage["completion_tokens_details"] == {"accepted_prediction_tokens": 2, "rejected_prediction_tokens": 2}
    client.answer = "a cat STOP more"
    client.proposals = dict.fromkeys(range(3, 15), (True, 0))
    usage = (await complete(http, prompt="x", stop=" STOP", max_tokens=20))["usage"]
    # those after the stop string are not in the answer
    assert usage["completion_tokens_details"] == {"accepted_prediction_tokens": 7, "rejected_prediction_tokens": 0}
    assert usage["completion_tokens"] == 10


async def test_a_stream_never_contains_the_stop_string(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.answer = "a cat STOP more"
    chunks = await stream(http, prompt="x", stop=" STOP", max_tokens=20)
    assert joined(chunks) == "a cat"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_stop_string_is_included_if_requested(http: httpx.AsyncClient, client: FakeClient) -> None:
    body = await complete(http, prompt="x", stop="c", include_stop_str_in_output=True)
    assert body["choices"][0]["text"] == "a c"


async def test_a_stop_string_waits_for_min_tokens(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.answer = "aXbXc"
    body = await complete(http, prompt="x", stop="X", min_tokens=3)
    assert body["choices"][0]["text"] == "aXb"


async def test_text_that_may_begin_a_stop_string_is_returned_at_max_tokens(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    body = await complete(http, prompt="x", stop="cab", max_tokens=4)
    assert body["choices"][0]["text"] == "a ca"
    assert body["choices"][0]["finish_reason"] == "length"


async def test_logprobs_are_four_parallel_lists(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.answer = "é"
    choice = (await complete(http, prompt="x", logprobs=2))["choices"][0]
    spelling = [TOKENIZER.token(token_id) for token_id in TOKENIZER.encode_plain("é")]
    assert choice["logprobs"]["tokens"] == [*spelling, "</s>"]
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * 3
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]
    assert choice["logprobs"]["top_logprobs"][2] == {"</s>": -0.5, "<image>": -1.5}


async def test_echo_with_no_new_tokens_scores_the_prompt(http: httpx.AsyncClient) -> None:
    body = await complete(http, prompt=[image_part(), text_part("ab")], echo=True, logprobs=1, max_tokens=0)
    assert body["choices"][0] == {
        "index": 0,
        "text": "ab",
        "finish_reason": "length",
        "logprobs": {
            "tokens": ["<image>", "a", "b"],
            "token_logprobs": [None, -0.5, -0.5],
            "top_logprobs": [None, {"a": -0.5}, {"b": -0.5}],
            "text_offset": [0, 0, 1],
        },
    }
    assert body["usage"]["completion_tokens"] == 0


async def test_echo_puts_the_prompt_in_front(http: httpx.AsyncClient) -> None:
    body = await complete(http, prompt="It is ", echo=True, logprobs=0, return_token_ids=True)
    choice = body["choices"][0]
    assert choice["text"] == "It is a cat"
    assert choice["logprobs"]["text_offset"] == [*range(11), 11]
    assert choice["token_ids"] == [*TOKENIZER.encode_plain("a cat"), EOS]
    assert joined(await stream(http, prompt="It is ", echo=True)) == "It is a cat"


async def test_prompt_logprobs_come_by_token_id(http: httpx.AsyncClient) -> None:
    (choice,) = (await complete(http, prompt="ab", prompt_logprobs=1, max_tokens=1))["choices"]
    b = TOKENIZER.encode_plain("b")[0]
    assert choice["prompt_logprobs"] == [None, {str(b): {"logprob": -0.5, "decoded_token": "b"}}]


async def test_the_response_has_the_clients_request_id(http: httpx.AsyncClient, client: FakeClient) -> None:
    response = await http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "cmpl-mine-1"
    assert (await complete(http, prompt="x", request_id="body-1"))["id"] == "cmpl-body-1"
    await http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "mine-1"})
    assert len({request.request_id for request in client.requests}) == 3


async def fail_at(index: int, failing_index: int, error: Exception) -> None:
    if index == failing_index:
        raise error


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineDied("died"), 503, "engine_died"),
        (EngineFailed("gave up"), 500, "engine_failed"),
        (InvalidMedia("broken", param="prompt[1].image_url.url"), 400, "invalid_media"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_error_before_the_first_token_is_a_status(
    http: httpx.AsyncClient, client: FakeClient, error: Any, status: int, code: str, is_stream: bool
) -> None:
    client.before = lambda index: fail_at(index, 0, error)
    response = await post(http, prompt="x", stream=is_stream)
    assert response.status_code == status
    assert response.json() == error.body()
    assert response.json()["error"]["code"] == code
    assert ("retry-after" in response.headers) == (status == 503)
    assert response.headers["x-should-retry"] == "false"


async def test_an_error_in_a_stream_is_an_event_and_the_stream_still_ends(
    http: httpx.AsyncClient, client: FakeClient
) -> None:
    client.before = lambda index: fail_at(index, 2, EngineDied("died"))
    first, second, error = await stream(http, prompt="x")
    assert joined([first, second]) == "a "
    assert error == EngineDied("died").body()


async def test_a_bug_in_a_stream_reveals_no_details(http: httpx.AsyncClient, client: FakeClient) -> None:
    client.before = lambda index: fail_at(index, 1, KeyError("/secret/path"))
    *_, error = await stream(http, prompt="x")
    assert error["error"]["code"] == "engine_failed"
    assert "secret" not in json.dumps(error)


async def test_metrics_count_requests_tokens_and_media(
    http: httpx.AsyncClient, client: FakeClient, app: FastAPI
) -> None:
    client.admitted = Admitted(request_id="", queue_seconds=0.5, cached_tokens=3, media_encoded=1, media_cached=2)
    await complete(http, prompt="hello")
    await complete(http, prompt="hello", max_tokens=2)
    await post(http, prompt="x", nn=3)
    text = (await http.get("/metrics")).text

    def value(name: str, labels: str = "") -> float:
        (line,) = (s for s in text.splitlines() if s.startswith(f'flamboyance:{name}{{{labels}model_name="tiny"'))
        return float(line.split()[-1])

    assert value("request_success_total", 'finished_reason="stop",') == 1
    assert value("request_success_total", 'finished_reason="length",') == 1
    assert value("request_refused_total", 'code="unsupported_parameter",') == 1
    assert value("prompt_tokens_total") == 10
    assert value("prompt_tokens_cached_total") == 6
    assert value("generation_tokens_total") == 8
    assert value("media_encoded_total") == 2
    assert value("media_cached_total") == 4
    assert value("time_to_first_token_seconds_count") == 2
    assert value("inter_token_latency_seconds_count") == 6
    assert value("request_queue_time_seconds_sum") == 1
    assert value("e2e_request_latency_seconds_count") == 2
