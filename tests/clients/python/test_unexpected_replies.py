"""Tests that a reply of another form than the documented one is an error of the package, whatever is wrong with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from flamboyance_client import (
    BadRequest,
    Client,
    Evaluation,
    FlamboyanceError,
    NotFound,
    ServerFault,
    TransportError,
    UnexpectedReply,
    progress,
    resources,
)

DEEP = b"[" * 200_000
RANKED = {"label": "a", "confidence": 0.5}
EVALUATION = {"id": "eval_1", "status": "running", "progress": {"queries": 2, "queries_done": 0}}


def answering(response: httpx.Response) -> Client:
    return Client("http://server", transport=httpx.MockTransport(lambda request: response))


def test_a_redirect_says_where_the_server_is() -> None:
    moved = httpx.Response(308, headers={"location": "https://server/v1/models"})
    with pytest.raises(
        BadRequest, match="308: /v1/models is redirected to https://server/v1/models: pass the address of"
    ):
        answering(moved).models()


def classify(client: Client) -> Any:
    return client.classify(b"a", examples="pets")


CALLS: list[tuple[Callable[[Client], Any], httpx.Response]] = [
    (Client.models, httpx.Response(200, stream=httpx.ByteStream(b"no"), headers={"content-encoding": "gzip"})),
    (Client.models, httpx.Response(200, content=DEEP)),
    (Client.models, httpx.Response(200, json={"data": ["a"]})),
    (classify, httpx.Response(200, json={**RANKED, "candidates": [{"label": "a"}]})),
    (classify, httpx.Response(200, json={**RANKED, "candidates": ["a"]})),
    (lambda client: client.complete("a"), httpx.Response(200, json={"choices": []})),
    (lambda client: client.fewshot.complete(b"a"), httpx.Response(200, json={"choices": []})),
    (lambda client: client.support_sets.list(), httpx.Response(200, json={"data": [], "has_more": True})),
    (lambda client: client.embed("a"), httpx.Response(200, json={"data": [{}]})),
]


@pytest.mark.parametrize(("call", "response"), CALLS)
def test_another_reply_is_unexpected(call: Callable[[Client], Any], response: httpx.Response) -> None:
    with answering(response) as client, pytest.raises(UnexpectedReply):
        call(client)


def test_another_error_is_that_of_its_status() -> None:
    with answering(httpx.Response(500, content=DEEP)) as client, pytest.raises(ServerFault):
        client.models()


@pytest.mark.parametrize("event", [b'{"choices":["a"]}', b'{"choices":[{"text":"\xff"}]}'])
def test_another_event_ends_a_stream(event: bytes) -> None:
    client = answering(httpx.Response(200, content=b"data: " + event + b"\n\n"))
    with pytest.raises(FlamboyanceError), client.stream("a") as events:
        list(events)


def test_a_proxy_without_a_server_is_not_ready() -> None:
    with answering(httpx.Response(503, html="<html>down</html>")) as client:
        assert not client.health().ready
    with answering(httpx.Response(200, html="<html>")) as client, pytest.raises(UnexpectedReply):
        client.health()


def test_a_misspelled_option_names_the_one_that_was_meant() -> None:
    with answering(httpx.Response(500)) as client:
        with pytest.raises(TypeError, match=r"unknown option max_token; did you mean max_tokens\?"):
            client.complete("a", max_token=3)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"unknown option colour$"):
            client.complete("a", colour=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_client_is_a_client_of_the_same_server(copied: Callable[[Client], Client]) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"data": [{"id": str(request.url)}]}))
    with Client("http://server", api_key="key", transport=transport) as client:
        assert copied(client).models() == client.models()


def lost(monkeypatch: pytest.MonkeyPatch, num_lost: int, num_replies: int = 1) -> Evaluation:
    """Wait for an evaluation whose connection is lost after the first replies."""
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(resources, "LOST_SECONDS", (0.0, 0.0))
    numbers = iter(range(100))

    def handle(request: httpx.Request) -> httpx.Response:
        number = next(numbers)
        if 0 <= number - num_replies < num_lost:
            raise httpx.ReadError("reset")
        return httpx.Response(200, json=EVALUATION if number < num_replies else {**EVALUATION, "status": "completed"})

    with Client("http://server", transport=httpx.MockTransport(handle)) as client:
        return client.evaluations.wait("eval_1")


def test_a_process_without_stderr_waits_for_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert lost(monkeypatch, 0).is_over


def test_a_wait_for_an_evaluation_goes_on_after_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost(monkeypatch, 2).is_over
    with pytest.raises(TransportError) as caught:
        lost(monkeypatch, 3)
    assert caught.value.__notes__ == ["the evaluation eval_1 continues; evaluations.wait('eval_1') waits for it again"]


def test_the_first_connection_of_a_wait_may_be_lost_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost(monkeypatch, 2, num_replies=0).is_over
    with pytest.raises(TransportError) as caught:
        lost(monkeypatch, 3, num_replies=0)
    assert caught.value.__notes__


def test_an_evaluation_that_does_not_exist_does_not_continue() -> None:
    with (
        answering(httpx.Response(404, json={"error": {"message": "gone"}})) as client,
        pytest.raises(NotFound) as caught,
    ):
        client.evaluations.wait("eval_1")
    assert not hasattr(caught.value, "__notes__")
