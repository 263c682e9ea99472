"""Tests of many classifications at once, of both clients with a fake server: order, concurrency, failures."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from flamboyance_client import (
    AsyncClient,
    BadRequest,
    Classification,
    Client,
    NotAuthorised,
    NotConnected,
    NotFound,
    QueriesFailed,
    Retries,
    query,
)
from flamboyance_client.batches import run_all
from tests.clients.python import interrupted

Handler = Callable[[httpx.Request], httpx.Response]
ClassifyMany = Callable[..., list[Any]]
RETRIES = Retries(first_delay=0.001)


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Callable[[Handler], ClassifyMany]:
    """Return a function that makes `classify_many` of a client of a fake server."""
    return blocking if request.param == "sync" else asynchronous


def blocking(handler: Handler) -> ClassifyMany:
    def classify_many(*arguments: Any, **options: Any) -> list[Any]:
        with Client("http://server", transport=httpx.MockTransport(handler), retries=RETRIES) as client:
            return client.classify_many(*arguments, **options)

    return classify_many


def asynchronous(handler: Handler) -> ClassifyMany:
    async def threaded(request: httpx.Request) -> httpx.Response:
        return await asyncio.to_thread(handler, request)

    def classify_many(*arguments: Any, **options: Any) -> list[Any]:
        async def run() -> list[Any]:
            transport = httpx.MockTransport(threaded)
            async with AsyncClient("http://server", transport=transport, retries=RETRIES) as client:
                return await client.classify_many(*arguments, **options)

        return asyncio.run(run())

    return classify_many


def content(request: httpx.Request) -> str:
    """Return the bytes of the query's image as text."""
    url = json.loads(request.content)["query"]["image"]
    return base64.b64decode(url.partition(",")[2]).decode(errors="replace")


def classified(label: str) -> httpx.Response:
    return httpx.Response(200, json={"label": label, "confidence": 0.5, "candidates": []})


def refused(status: int, code: str, param: str | None, **headers: str) -> httpx.Response:
    return httpx.Response(
        status, json={"error": {"message": "no", "code": code, "param": param}}, headers={"retry-after": "0", **headers}
    )


def echo(request: httpx.Request) -> httpx.Response:
    if content(request) == "broken":
        return refused(400, "invalid_media", "query.image")
    return classified(content(request))


def test_results_have_the_order_of_the_queries(connect: Callable[[Handler], ClassifyMany]) -> None:
    num_running, most, lock = 0, 0, threading.Lock()
    all_running, later_done = threading.Barrier(3), threading.Event()

    def first_is_last(request: httpx.Request) -> httpx.Response:
        nonlocal num_running, most
        with lock:
            num_running += 1
            most = max(most, num_running)
        all_running.wait(60)
        if content(request) == "0":
            assert later_done.wait(60)
        with lock:
            num_running -= 1
        later_done.set()
        return classified(content(request))

    labels = [str(number) for number in range(12)]
    results = connect(first_is_last)([label.encode() for label in labels], concurrency=3)
    assert [result.label for result in results] == labels
    assert most == 3


def test_media_of_every_kind_are_queries(connect: Callable[[Handler], ClassifyMany], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"file")
    (tmp_path / "b.png").write_bytes(b"text")
    pixels = np.zeros((2, 3, 3), np.uint8)
    queries = [tmp_path / "a.png", str(tmp_path / "b.png"), Image.fromarray(pixels), pixels, b"bytes", query(b"query")]
    results = connect(echo)(iter(queries), candidates=["a"])
    assert [result.label[1:4] if index in (2, 3) else result.label for index, result in enumerate(results)] == [
        "file",
        "text",
        "PNG",
        "PNG",
        "bytes",
        "query",
    ]
    assert connect(echo)([]) == []


def test_a_failed_query_loses_no_other(connect: Callable[[Handler], ClassifyMany], tmp_path: Path) -> None:
    queries = [b"a", b"broken", tmp_path / "missing.png", b"", None, b"b"]
    results = connect(echo)(queries, on_error="return")
    assert [type(result) for result in results] == [
        Classification,
        BadRequest,
        FileNotFoundError,
        ValueError,
        TypeError,
        Classification,
    ]
    with pytest.raises(QueriesFailed, match=r"4 of 6 queries failed; the first is queries\[1\]: 400: no") as caught:
        connect(echo)(queries)
    assert [getattr(result, "label", None) for result in caught.value.results] == ["a", None, None, None, None, "b"]
    with pytest.raises(QueriesFailed, match=r"1 of 1 queries failed; the first is .*missing\.png: "):
        connect(echo)([tmp_path / "missing.png"])


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (refused(401, "invalid_api_key", None), NotAuthorised),
        (refused(404, "support_set_not_found", None), NotFound),
        (refused(404, "not_found", None), NotFound),
        (httpx.Response(404, html="<h1>Not Found</h1>"), NotFound),
        (refused(422, "unsupported_parameter", "examples.k"), BadRequest),
        (None, NotConnected),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_an_error_of_every_query_is_raised_at_once(
    connect: Callable[[Handler], ClassifyMany], reply: httpx.Response | None, kind: type[Exception], on_error: str
) -> None:
    requests: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        if reply is None:
            raise httpx.ConnectError("refused")
        return httpx.Response(reply.status_code, content=reply.content)

    with pytest.raises(kind):
        connect(handle)([b"a"] * 50, concurrency=2, on_error=on_error)
    assert len(requests) < 50


@pytest.mark.parametrize("is_lost", [True, False])
def test_an_error_of_every_query_loses_no_finished_result(
    connect: Callable[[Handler], ClassifyMany], is_lost: bool
) -> None:
    contents: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        contents.append(content(request))
        if len(contents) <= 3:
            return classified(content(request))
        if is_lost:
            raise httpx.ConnectError("refused")
        return refused(404, "support_set_not_found", "examples.support_set")

    queries = [str(number).encode() for number in range(50)]
    results = connect(handle)(queries, concurrency=1, on_error="return")
    assert [result.label for result in results[:3]] == ["0", "1", "2"]
    assert {type(result) for result in results[3:]} == {NotConnected if is_lost else NotFound}
    assert set(contents) == {"0", "1", "2", "3"}
    contents.clear()
    with pytest.raises(QueriesFailed, match="47 of 50 queries failed") as caught:
        connect(handle)(queries, concurrency=1)
    assert len(caught.value.results) == 50


def test_a_query_that_is_too_long_loses_no_other(connect: Callable[[Handler], ClassifyMany]) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if content(request) == "broken":
            return refused(400, "context_length_exceeded", "examples.k")
        return classified(content(request))

    results = connect(handle)([b"broken", b"a"], on_error="return", concurrency=1)
    assert [type(result) for result in results] == [BadRequest, Classification]


def test_an_image_that_is_not_found_loses_no_other(connect: Callable[[Handler], ClassifyMany]) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if content(request) == "broken":
            return refused(404, "image_not_found", "query.image")
        return classified(content(request))

    results = connect(handle)([b"broken", b"a"], on_error="return", concurrency=1)
    assert [type(result) for result in results] == [NotFound, Classification]


def test_outcomes_are_outcomes_in_order_as_soon_as_they_are_known() -> None:
    all_sent, outcomes = threading.Event(), []

    def send(number: Any) -> Any:
        if number == 0:
            assert all_sent.wait(60)
        if number == 1:
            all_sent.set()
        if number == 3:
            assert outcomes_two.wait(60)
        if number == 4:
            raise NotConnected("refused")
        return Classification(label=str(number), confidence=0.5, candidates=())

    outcomes_two = threading.Event()

    def show(outcome: Any) -> None:
        outcomes.append(outcome)
        if len(outcomes) == 2:
            outcomes_two.set()

    results = run_all(send, [*range(8)], 2, lambda: None, show)
    assert outcomes == results
    assert [getattr(result, "label", None) for result in results] == ["0", "1", "2", "3", *[None] * 4]


def test_an_error_whose_fields_are_no_texts_ends_its_query_alone(connect: Callable[[Handler], ClassifyMany]) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if content(request) == "broken":
            return httpx.Response(400, json={"error": {"message": "no", "param": ["query"], "code": {}, "type": 3}})
        return echo(request)

    failed, answered = connect(handle)([b"broken", b"a"], on_error="return", concurrency=1)
    assert (str(failed), failed.type, failed.param, failed.code) == ("400: no", None, None, None)
    assert answered.label == "a"


def test_an_error_of_the_client_itself_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> bool:
        raise AttributeError("a mistake")

    monkeypatch.setattr("flamboyance_client.batches._is_of_every_query", fail)
    with pytest.raises(AttributeError, match="a mistake"):
        blocking(echo)([b"broken", b"a"])


def test_a_process_without_stderr_has_results(
    connect: Callable[[Handler], ClassifyMany], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert [result.label for result in connect(echo)([b"a"])] == ["a"]


def test_an_overloaded_server_is_sent_a_query_again(connect: Callable[[Handler], ClassifyMany]) -> None:
    replies = iter([refused(503, "overloaded", None), refused(429, "client_over_share", None)])
    results = connect(lambda request: next(replies, None) or echo(request))([b"a", b"b"], concurrency=1)
    assert [result.label for result in results] == ["a", "b"]


def test_an_unavailable_server_fails_the_query(connect: Callable[[Handler], ClassifyMany]) -> None:
    with pytest.raises(QueriesFailed, match="503"):
        connect(lambda request: refused(503, "engine_died", None, **{"x-should-retry": "false"}))([b"a"])


class Unanswering(BaseHTTPRequestHandler):
    """Refuses the first request for some seconds, and keeps the second waiting until its connection ends."""

    server: UnansweringServer

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.numbers.popleft() == 0:
            self.send_response(503)
            self.send_header("Retry-After", "25")
            self.end_headers()
            self.server.waiting.release()
        else:
            self.connection.settimeout(20)
            self.server.waiting.release()
            with suppress(OSError):
                self.server.ended.put(self.connection.recv(1))

    def log_message(self, *_: object) -> None:
        pass


class UnansweringServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Unanswering)
        self.numbers = deque(range(2))
        self.waiting = threading.Semaphore(0)
        self.ended = SimpleQueue[bytes]()


def test_an_interrupt_ends_the_running_requests_and_the_process_at_once() -> None:
    with UnansweringServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, "-m", interrupted.__name__, f"http://127.0.0.1:{server.server_port}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for _ in range(2):
                assert server.waiting.acquire(timeout=60)
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "KeyboardInterrupt\n"
            assert server.ended.get(timeout=10) == b""
            process.stdin.close()  # until then, the process runs
            assert process.wait(60) == 0
            assert time.monotonic() - started < 10
        server.shutdown()


def test_mistakes_in_the_call_are_refused(connect: Callable[[Handler], ClassifyMany]) -> None:
    classify_many = connect(echo)
    for single in ("a.png", Path("a.png"), b"a", query(b"a")):
        with pytest.raises(TypeError, match=r"queries must be a list, which media_files\(folder\)"):
            classify_many(single)
    for concurrency in (0, 101):
        with pytest.raises(ValueError, match=f"concurrency must be 1 to 100, not {concurrency}"):
            classify_many([b"a"], concurrency=concurrency)
    with pytest.raises(TypeError, match="unknown option colour"):
        classify_many([b"a"], colour="red")
