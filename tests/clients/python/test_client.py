"""Tests of both clients with a fake server (`httpx.MockTransport`): same calls, same replies, same errors."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

import httpx
import pytest

from flamboyance_client import (
    ApiError,
    AsyncClient,
    BadRequest,
    Client,
    Completion,
    Health,
    Model,
    NotAuthorised,
    NotConnected,
    NotFound,
    ServerFault,
    StreamFailed,
    TimedOut,
    TransportError,
    Unavailable,
    UnexpectedReply,
    image,
)

Handler = Callable[[httpx.Request], httpx.Response]

COMPLETION: dict[str, Any] = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1,
    "model": "tiny",
    "choices": [
        {
            "index": 0,
            "text": " cat.",
            "finish_reason": "stop",
            "token_ids": [5, 6],
            "prompt_token_ids": [1, 2, 3],
            "prompt_logprobs": [None, {"2": {"logprob": -1.0, "decoded_token": "b"}}],
            "logprobs": {
                "tokens": [" cat", "."],
                "token_logprobs": [None, -0.5],
                "top_logprobs": [None, {".": -0.5, "!": -2.0}],
                "text_offset": [0, 4],
            },
        }
    ],
    "usage": {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
        "fewshot_details": {"images_encoded": 1},
    },
    "future_field": True,
}


class AnyClient(Protocol):
    """A client as the tests use it. Each call of the async client runs to its end."""

    def complete(self, prompt: Any, **options: Any) -> Completion: ...
    def stream(self, prompt: Any, max_events: int = ..., **options: Any) -> list[Completion]: ...
    def models(self) -> tuple[Model, ...]: ...
    def health(self) -> Health: ...


class SyncClient:
    def __init__(self, handler: Handler, **settings: Any) -> None:
        self.client = Client("http://server", transport=httpx.MockTransport(handler), **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def stream(self, prompt: Any, max_events: int = 1000, **options: Any) -> list[Completion]:
        with self.client.stream(prompt, **options) as events:
            return [event for _, event in zip(range(max_events), events, strict=False)]


class AwaitedClient:
    def __init__(self, handler: Handler, **settings: Any) -> None:
        self.handler, self.settings = handler, settings

    def new(self) -> AsyncClient:
        return AsyncClient("http://server", transport=httpx.MockTransport(self.handler), **self.settings)

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **options: Any) -> Any:
            async with self.new() as client:
                return await getattr(client, name)(*arguments, **options)

        return lambda *arguments, **options: asyncio.run(call(*arguments, **options))

    def stream(self, prompt: Any, max_events: int = 1000, **options: Any) -> list[Completion]:
        async def collect() -> list[Completion]:
            received: list[Completion] = []
            async with self.new() as client, client.stream(prompt, **options) as events:
                async for event in events:
                    received.append(event)
                    if len(received) == max_events:
                        break
            return received

        return asyncio.run(collect())


@pytest.fixture(params=[SyncClient, AwaitedClient], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Callable[..., AnyClient]:
    client: Callable[..., AnyClient] = request.param
    return client


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the sleep of the clients, and record its seconds."""
    delays: list[float] = []

    async def sleep(seconds: float) -> None:
        delays.append(seconds)

    # Only in the module of the client, because servers of other tests sleep too.
    monkeypatch.setattr("flamboyance_client.client.time", SimpleNamespace(**{**vars(time), "sleep": delays.append}))
    monkeypatch.setattr("flamboyance_client.client.asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    return delays


def fixed(status: int, body: Any = None, **headers: str) -> Handler:
    return lambda request: httpx.Response(status, json=body, headers=headers)


def events(*data: Any, done: bool = True, status: int = 200) -> Handler:
    lines = [": waiting\n\n", *(f"data: {json.dumps(item)}\n\n" for item in data), *(["data: [DONE]\n\n"] * done)]
    return lambda request: httpx.Response(status, text="".join(lines))


def chunk(text: str, **fields: Any) -> dict[str, Any]:
    return {"id": "cmpl-1", "model": "tiny", "choices": [{"index": 0, "text": text, **fields}]}


def test_a_completion_is_sent_and_parsed(connect: Callable[..., AnyClient]) -> None:
    requests: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json=COMPLETION)

    client = connect(handler, api_key="secret", model="tiny")
    reply = client.complete(["A", image("data:,")], max_tokens=2, stop=["\n"], seed=None, logprobs=0, echo=True)

    (request,) = requests
    assert (request.method, str(request.url)) == ("POST", "http://server/v1/completions")
    assert request.headers["authorization"] == "Bearer secret"
    assert json.loads(request.content) == {
        "model": "tiny",
        "prompt": [{"type": "text", "text": "A"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
        "max_tokens": 2,
        "stop": ["\n"],
        "logprobs": 0,
        "echo": True,
    }
    assert (reply.id, reply.model, reply.text, reply.finish_reason) == ("cmpl-1", "tiny", " cat.", "stop")
    assert reply.raw == COMPLETION


def test_all_fields_of_a_completion_are_parsed(connect: Callable[..., AnyClient]) -> None:
    reply = connect(fixed(200, COMPLETION)).complete("A")
    (choice,) = reply.choices
    assert choice.token_ids == (5, 6)
    assert choice.prompt_token_ids == (1, 2, 3)
    assert choice.prompt_logprobs == (None, {"2": {"logprob": -1.0, "decoded_token": "b"}})
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == (" cat", ".")
    assert choice.logprobs.token_logprobs == (None, -0.5)
    assert choice.logprobs.top_logprobs == (None, {".": -0.5, "!": -2.0})
    assert choice.logprobs.text_offset == (0, 4)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 2, 5)
    assert reply.usage.cached_tokens == 1
    assert reply.usage.fewshot_details == {"images_encoded": 1}


@pytest.mark.parametrize(
    ("key", "header"),
    [
        ("secret", "Bearer secret"),
        ("secret\n", "Bearer secret"),
        (" \tsecret key\r\n", "Bearer secret key"),
        ("", None),
        (" \n", None),
        (None, None),
    ],
)
def test_a_key_is_sent_without_white_space_around_it(
    connect: Callable[..., AnyClient], key: str | None, header: str | None
) -> None:
    headers: list[str | None] = []

    def handler(request: httpx.Request) -> httpx.Response:
        headers.append(request.headers.get("authorization"))
        return httpx.Response(200, json=COMPLETION)

    connect(handler, api_key=key).complete("A")
    assert headers == [header]


def test_an_unknown_option_raises_before_sending(connect: Callable[..., AnyClient]) -> None:
    with pytest.raises(TypeError, match="max_tokns"):
        connect(fixed(200, COMPLETION)).complete("A", max_tokns=3)


def test_a_stream_yields_all_its_events(connect: Callable[..., AnyClient]) -> None:
    usage = {"id": "cmpl-1", "model": "tiny", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    handler = events(chunk(" a"), chunk(" \u2028é", finish_reason="length"), usage)
    received = connect(handler).stream("A")
    assert [event.text for event in received] == [" a", " \u2028é", ""]
    assert received[1].finish_reason == "length"
    assert received[2].usage is not None
    assert received[2].usage.total_tokens == 3


def test_a_stream_requests_the_usage(connect: Callable[..., AnyClient]) -> None:
    bodies: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return events()(request)

    assert connect(handler).stream("A", max_tokens=1) == []
    assert bodies == [
        {"prompt": "A", "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}},
    ]


def test_a_stream_can_be_left_early(connect: Callable[..., AnyClient]) -> None:
    assert [event.text for event in connect(events(chunk("a"), chunk("b"))).stream("A", max_events=1)] == ["a"]


def test_an_error_event_raises(connect: Callable[..., AnyClient]) -> None:
    error = {"error": {"message": "worker died", "type": "server_error", "param": None, "code": "engine_dead"}}
    with pytest.raises(StreamFailed, match="worker died") as caught:
        connect(events(chunk("a"), error)).stream("A")
    assert (caught.value.type, caught.value.code, caught.value.status) == ("server_error", "engine_dead", None)


def test_a_truncated_stream_raises(connect: Callable[..., AnyClient]) -> None:
    with pytest.raises(UnexpectedReply, match="ended before"):
        connect(events(chunk("a"), done=False)).stream("A")


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (401, NotAuthorised),
        (403, NotAuthorised),
        (404, NotFound),
        (408, Unavailable),
        (413, BadRequest),
        (422, BadRequest),
        (429, Unavailable),
        (500, ServerFault),
        (503, Unavailable),
    ],
)
def test_a_status_raises_its_error(
    connect: Callable[..., AnyClient], delays: list[float], status: int, kind: type[ApiError], streamed: bool
) -> None:
    body = {"error": {"message": "no such thing", "type": "t", "param": "p", "code": "c"}}
    handler = fixed(status, body, **{"x-request-id": "r-1", "retry-after": "9"})
    client = connect(handler)
    with pytest.raises(kind, match=f"{status}: no such thing") as caught:
        (client.stream if streamed else client.complete)("A")
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.message, error.type, error.param, error.code) == (
        status,
        "no such thing",
        "t",
        "p",
        "c",
    )
    assert (error.request_id, error.retry_after) == ("r-1", 9.0)
    assert delays == ([9.0, 9.0] if kind is Unavailable else [])


def test_a_temporary_error_is_retried(connect: Callable[..., AnyClient], delays: list[float]) -> None:
    replies = iter([httpx.Response(503, headers={"retry-after": "2"}), httpx.Response(429), None])
    bodies: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        return next(replies) or httpx.Response(200, json=COMPLETION)

    assert connect(handler).complete("A").text == " cat."
    assert delays[0] == 2.0
    assert len(delays) == 2
    assert len(set(bodies)) == 1


def test_a_request_that_may_have_killed_the_engine_is_not_retried(
    connect: Callable[..., AnyClient], delays: list[float]
) -> None:
    headers = {"retry-after": "5", "x-should-retry": "false"}
    with pytest.raises(Unavailable) as caught:
        connect(fixed(503, {"error": {"message": "died", "code": "engine_died"}}, **headers)).complete("A")
    assert (caught.value.should_retry, caught.value.code) == (False, "engine_died")
    assert delays == []


@pytest.mark.parametrize("body", [b"<html>bad gateway</html>", b'"odd"', b"[]", b'{"error": "short"}', b"\xff"])
def test_an_error_body_need_not_be_json(connect: Callable[..., AnyClient], body: bytes) -> None:
    with pytest.raises(ServerFault) as caught:
        connect(lambda request: httpx.Response(502, content=body)).complete("A")
    assert caught.value.message


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"choices": [{}]}', b'{"choices": 3}'])
def test_a_malformed_reply_raises(connect: Callable[..., AnyClient], body: bytes) -> None:
    with pytest.raises(UnexpectedReply):
        connect(lambda request: httpx.Response(200, content=body)).complete("A")


@pytest.mark.parametrize(
    ("failure", "kind", "attempts"),
    [
        (httpx.ConnectError("refused"), NotConnected, 3),
        (httpx.ConnectTimeout(""), NotConnected, 3),
        (httpx.ReadTimeout("slow"), TimedOut, 1),
        (httpx.RemoteProtocolError("connection lost"), TransportError, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_transport_errors_are_converted(
    connect: Callable[..., AnyClient],
    delays: list[float],
    failure: Exception,
    kind: type[TransportError],
    attempts: int,
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise failure

    with pytest.raises(kind) as caught:
        connect(handler).complete("A")
    assert type(caught.value) is kind
    assert str(caught.value)
    assert len(delays) == attempts - 1


def test_models(connect: Callable[..., AnyClient]) -> None:
    client = connect(fixed(200, {"object": "list", "data": [{"id": "tiny", "max_model_len": 64}]}))
    (model,) = client.models()
    assert (model.id, model.raw["max_model_len"]) == ("tiny", 64)


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False)])
def test_an_unhealthy_server_is_a_reply_and_no_error(
    connect: Callable[..., AnyClient], delays: list[float], status: int, ready: bool
) -> None:
    health = connect(fixed(status, {"status": "starting"})).health()
    assert (health.ready, health.raw) == (ready, {"status": "starting"})
    assert delays == []
