"""A response that its client does not read is counted until it is read, and is refused if others take the memory."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.types import ASGIApp

from server.api.responses import PIECE
from server.errors import MediaNotFound
from server.limits.admission import Admission
from server.limits.deadline import HEADER
from server.settings import Settings
from tests.server.conftest import png
from tests.server.fakes import eventually
from tests.server.limits.test_admission import from_address

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={"max_bodies_mb": 1, "max_body_mb": 4, "max_media_mb": 1.0, "max_client_share": 1.0}
    )


class Reader:
    """A client of the application that takes the pieces of a response only on request."""

    def __init__(self, app: ASGIApp, path: str, body: Any = None, **headers: str) -> None:
        self.status = 0
        self.pieces: list[int] = []
        self._body = b"" if body is None else json.dumps(body).encode()
        self._is_sent = False
        self._may_read = asyncio.Event()
        self._left = asyncio.Event()
        self._task = asyncio.create_task(self._send_request(app, path, headers))

    async def finish(self) -> None:
        self._may_read.set()
        await self._task

    async def disconnect(self) -> None:
        self._left.set()
        await self.finish()

    async def abort(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _send_request(self, app: ASGIApp, path: str, headers: dict[str, str]) -> None:
        every = {"host": "localhost", "content-type": "application/json", **headers}
        scope: dict[str, Any] = {
            "type": "http", "http_version": "1.1", "method": "POST" if self._body else "GET", "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(name.lower().encode(), value.encode()) for name, value in every.items()],
            "client": ("127.0.0.1", 1), "server": ("localhost", 80),
        }  # fmt: skip
        await app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._is_sent:
            await self._left.wait()
            return {"type": "http.disconnect"}
        self._is_sent = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        await self._may_read.wait()
        self.pieces.append(len(message["body"]))


def photograph() -> bytes:
    """Return a PNG file of about 430 kB."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (380, 380, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


async def test_unread_responses_count_as_bodies(app: FastAPI) -> None:
    admission: Admission = app.state.services.admission
    unread = Reader(app, "/detokenize", {"tokens": [5] * PIECE * 2})
    await eventually(lambda: unread.status == 200)
    body = len(json.dumps({"tokens": [5] * PIECE * 2}))
    assert admission.bodies.used > body + PIECE
    await unread.finish()
    assert sum(unread.pieces) + body > admission.bodies.used == 0


async def test_an_unread_download_is_in_memory_for_one_piece(http: httpx.AsyncClient, app: FastAPI) -> None:
    admission: Admission = app.state.services.admission
    data = photograph()
    stored = (await http.post("/v1/images", content=data, headers={"Content-Type": "image/png"})).json()
    path = f"/v1/images/{stored['id']}/content"
    tracemalloc.start()
    unread = [Reader(app, path) for _ in range(8)]
    await eventually(lambda: [reader.status for reader in unread] == [200] * 8)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # a piece that the connection has not taken, and the next one
    assert held < 8 * 3 * PIECE < 4 * len(data)
    assert admission.bodies.used == 0
    response = await http.get(path)
    assert (response.content, response.headers["content-length"]) == (data, str(len(data)))
    await unread[0].finish()
    assert (sum(unread[0].pieces), max(unread[0].pieces)) == (len(data), PIECE)
    for reader in unread[1:]:
        await reader.abort()
    assert (admission.num_running, admission.num_unfinished) == (0, 0)


class TestUnreadExports:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_media_mb": 1.0, "max_body_mb": 1.0})

    async def test_they_are_downloads_too(self, http: httpx.AsyncClient, app: FastAPI) -> None:
        """It is not cut at the end of its request's deadline, and shutdown waits for it."""
        admission: Admission = app.state.services.admission
        data = photograph()
        examples = [{"image": f"data:image/png;base64,{base64.b64encode(data).decode()}", "label": "a"}]
        assert (await http.post("/v1/support_sets", json={"name": "s", "examples": examples})).status_code == 200
        unread = Reader(app, "/v1/support_sets/s/export", **{HEADER: "2"})
        await eventually(lambda: unread.status == 200)
        await asyncio.sleep(2.2)
        assert (admission.num_running, admission.num_unfinished) == (0, 1)
        await unread.finish()
        assert sum(unread.pieces) > len(data)
        assert admission.num_unfinished == 0


async def test_a_download_that_is_damaged_at_its_end_is_not_complete(http: httpx.AsyncClient, app: FastAPI) -> None:
    data = photograph()
    stored = (await http.post("/v1/images", content=data, headers={"Content-Type": "image/png"})).json()
    (file,) = app.state.services.settings.data_dir.rglob(stored["id"])
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    reader = Reader(app, f"/v1/images/{stored['id']}/content")
    with pytest.raises(MediaNotFound):
        await reader.finish()
    assert PIECE < sum(reader.pieces) < len(data)
    assert app.state.services.admission.num_unfinished == 0


async def test_a_download_without_its_body_is_not_read(http: httpx.AsyncClient, app: FastAPI) -> None:
    stored = (await http.post("/v1/images", content=photograph(), headers={"Content-Type": "image/png"})).json()

    async def head(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "method": "HEAD"}, receive, send)

    reader = Reader(head, f"/v1/images/{stored['id']}/content")
    await reader.finish()
    assert (reader.status, reader.pieces) == (200, [0])


@pytest.mark.parametrize(
    ("path", "reading"),
    [
        ("/v1/images", "server.media.store.MediaStore.names"),
        ("/v1/support_sets/s/export", "server.api.routes.archives.write_archive"),
    ],
)
async def test_a_client_that_reads_storage_again_and_again_leaves_threads_to_others(
    path: str, reading: str, http: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    await http.post("/v1/support_sets", json={"name": "s"})
    image_id = (await http.post("/v1/images", content=png(), headers={"Content-Type": "image/png"})).json()["id"]
    may_end, begun = threading.Event(), list[str]()

    def read(*_: Any, **__: Any) -> Iterator[bytes]:
        begun.append(path)
        may_end.wait()
        yield from ()

    monkeypatch.setattr(reading, read)
    greedy = [asyncio.create_task(http.get(path)) for _ in range(64)]
    try:
        await eventually(lambda: begun != [])
        await asyncio.sleep(0.5)
        assert len(begun) == 2
        async with from_address(app, "10.0.0.2") as other:
            answer = await asyncio.wait_for(other.get(f"/v1/images/{image_id}"), 10)
            assert answer.status_code == 200
            greedy.append(asyncio.create_task(other.get(path)))
            await eventually(lambda: len(begun) == 3)
            may_end.set()
            assert {response.status_code for response in await asyncio.gather(*greedy)} == {200}
    finally:
        may_end.set()


async def test_a_change_is_not_refused_after_it_was_made(http: httpx.AsyncClient, app: FastAPI) -> None:
    """A client, or a gateway, would repeat the request and make the change twice."""
    admission: Admission = app.state.services.admission
    examples = [{"id": f"{number:0100}", "text": "a", "label": "b"} for number in range(700)]
    with admission.ticket("other") as other:
        other.hold(900_000)
        created = await http.post("/v1/support_sets", json={"name": "many", "examples": examples})
        assert created.status_code == 200, created.text
        assert len(created.content) > PIECE
    assert admission.bodies.used == 0


async def test_a_request_that_changes_nothing_is_refused(http: httpx.AsyncClient, app: FastAPI) -> None:
    admission: Admission = app.state.services.admission
    tokens = {"tokens": [5] * PIECE * 2}
    with admission.ticket("other") as other:
        other.hold(900_000)
        refused = await http.post("/detokenize", json=tokens)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert admission.bodies.used == 0
    assert (await http.post("/detokenize", json=tokens)).status_code == 200


async def test_an_unread_response_takes_no_place_in_the_queue(http: httpx.AsyncClient, app: FastAPI) -> None:
    admission: Admission = app.state.services.admission
    unread = Reader(app, "/detokenize", {"tokens": [5] * PIECE * 2})
    await eventually(lambda: unread.status == 200)
    assert admission.num_waiting == 0
    await unread.finish()
    assert (admission.num_running, admission.num_unfinished) == (0, 0)


@pytest.mark.parametrize(("path", "num_tokens"), [("/detokenize", 5), ("/detokenize", PIECE * 2), ("/v1/models", 0)])
async def test_an_unread_response_delays_the_end_of_the_server_and_no_background_work(
    app: FastAPI, path: str, num_tokens: int
) -> None:
    admission: Admission = app.state.services.admission
    unread = Reader(app, path, {"tokens": [5] * num_tokens} if num_tokens else None)
    await eventually(lambda: unread.status == 200)
    await asyncio.wait_for(admission.wait_until_quiet(), 20)
    end = asyncio.create_task(admission.wait_until_empty())
    await asyncio.sleep(0.05)
    assert not end.done()
    await unread.finish()
    await asyncio.wait_for(end, 20)


async def test_a_client_may_read_for_longer_than_the_request_may_take(app: FastAPI) -> None:
    slow = Reader(app, "/detokenize", {"tokens": [5] * PIECE * 2}, **{HEADER: "3"})
    await eventually(lambda: slow.status == 200)
    await asyncio.sleep(3.1)
    await slow.finish()
    assert slow.pieces[-1] == 0


async def test_a_refusal_does_not_repeat_a_long_name(http: httpx.AsyncClient, app: FastAPI) -> None:
    """It is sent when the ticket is released already, so it would be counted for ever."""
    refused = await http.post("/v1/completions", json={"prompt": "a", "\x01" * PIECE: 1})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (422, "unsupported_parameter")
    assert error["message"].startswith("unknown parameter \x01")
    assert len(refused.content) < PIECE
    assert app.state.services.admission.bodies.used == 0


async def test_an_unknown_long_path_is_not_found(http: httpx.AsyncClient) -> None:
    """A control character has three characters in a path, and six in JSON."""
    response = await http.get("/playground/" + "%01" * 20_000)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert len(response.content) < PIECE
    longer = await http.post("/" + "%01" * 20_000, json={"x": 1})
    assert longer.status_code == 404
    assert len(longer.content) < PIECE


class TestShares:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_client_share": 0.5})

    async def test_a_client_that_reads_no_response_is_refused_the_next(
        self, http: httpx.AsyncClient, app: FastAPI
    ) -> None:
        """A response to a change is not refused, so requests are: otherwise such responses take all memory."""
        admission: Admission = app.state.services.admission
        with admission.ticket("127.0.0.1") as unread:
            unread.count(700_000)
            refused = await http.get("/v1/models")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "client_over_share")
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/metrics")).status_code == 200
            async with from_address(app, "10.0.0.9") as other:
                assert (await other.get("/v1/models")).status_code == 200
        assert (await http.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "; did you mean /v1/chat/completions?"),
        ("/v1/v1/models", "; did you mean /v1/models?"),
        ("/v1/tokenize", "; did you mean /tokenize?"),
        ("/v1/chat/completion", "; did you mean /v1/chat/completions?"),
        ("/v1/responses", "; this server answers conversations at /v1/chat/completions"),
        ("/api/tags", "; the served model is listed at /v1/models"),
        ("/v1/dogs", "; /docs lists the routes"),
        ("/v1", "; /docs lists the routes"),
    ],
)
async def test_an_unknown_path_is_answered_with_the_route_to_use(path: str, hint: str, http: httpx.AsyncClient) -> None:
    message = (await http.post(path, json={})).json()["error"]["message"]
    assert message == f"POST {path}: no such route{hint}"


async def test_a_path_may_end_with_a_slash(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models/")).json() == (await http.get("/v1/models")).json()
    tokens = await http.post("/tokenize/", json={"prompt": "a"})
    assert (tokens.status_code, tokens.json()["count"] > 0) == (200, True)
    message = (await http.post("/v1/dogs/", json={})).json()["error"]["message"]
    assert message == "POST /v1/dogs: no such route; /docs lists the routes"


async def test_a_path_with_a_line_break_is_not_found(http: httpx.AsyncClient) -> None:
    response = await http.get("/v1/mod%0D%0Aels")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


async def test_a_method_that_a_path_does_not_have_suggests_no_other_path(http: httpx.AsyncClient) -> None:
    message = (await http.get("/v1/completions")).json()["error"]["message"]
    assert message == "GET /v1/completions: use POST"


async def test_a_method_that_a_path_does_not_have_is_answered_with_those_that_it_has(http: httpx.AsyncClient) -> None:
    images = await http.put("/v1/images", json={})
    assert images.json()["error"]["message"] == "PUT /v1/images: use GET or POST"
    assert images.headers["allow"] == "GET, HEAD, POST"
    stored_set = await http.put("/v1/support_sets/x", json={})
    assert stored_set.headers["allow"] == "DELETE, GET, HEAD, PATCH"


async def test_a_path_of_another_server_is_not_found_even_if_it_looks_like_an_id(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/images/generations", json={})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    message = "POST /v1/images/generations: no such route; this server generates no images"
    assert response.json()["error"]["message"] == message
