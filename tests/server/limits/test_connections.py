"""Connections with a real listener: clients that send or read nothing hold neither a connection nor the server."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import uvicorn

from server.limits import connections
from server.limits.connections import Connection
from server.limits.framing import CHUNK_BYTES, FREE_CHUNKS, MAX_LINES, SHORT_BODY
from server.settings import Settings

pytestmark = pytest.mark.anyio
REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LARGE = b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
HALF_SENT = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers a request after its whole body; `GET /slow` after a second, and `GET /large` with more than is buffered.

    It refuses `POST /refused` before its body, and ends the connection. It answers `/unread` without reading the body,
    and begins the answer to `/early` before it reads it.
    """
    if scope["path"] == "/unread":
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"no"})
        return
    if scope["path"] == "/refused":
        await receive()
        headers = [(b"connection", b"close"), (b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": b"no"})
        return
    if scope["path"] == "/early":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass
    if scope["path"] == "/early":
        await send({"type": "http.response.body", "body": b"k"})
        return
    if message["type"] == "http.disconnect":
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(1)
    if scope["path"] == "/large":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Listener:
    """Opens connections to a listening server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._opened: list[asyncio.StreamWriter] = []

    async def open(self, data: bytes = b"") -> Streams:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._opened.append(writer)
        writer.write(data)
        await asyncio.sleep(0.02)  # the server accepts it, so that the order of connections is known
        return reader, writer

    async def close(self) -> None:
        for writer in self._opened:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._opened), return_exceptions=True)


@asynccontextmanager
async def listening(max_connections: int = 100, header_timeout: float = 60.0) -> AsyncIterator[Listener]:
    settings = Settings(max_connections=max_connections, header_timeout=header_timeout)
    http: Any = partial(Connection, settings=settings)
    server = uvicorn.Server(uvicorn.Config(application, port=0, http=http, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    listener = Listener(server.servers[0].sockets[0].getsockname()[1])
    yield listener
    await listener.close()
    server.should_exit = True
    server.force_exit = True
    await serving


async def is_open(streams: Streams) -> bool:
    try:
        return await asyncio.wait_for(streams[0].read(1), 0.2) != b""
    except TimeoutError:
        return True
    except ConnectionResetError:
        return False


async def is_answered(streams: Streams) -> bool:
    return (await asyncio.wait_for(streams[0].readline(), 30)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n"], ids=["silent", "half a head"])
async def test_a_head_that_does_not_arrive_in_time_closes_the_connection(head: bytes) -> None:
    async with listening(header_timeout=0.3) as listener:
        streams = await listener.open(head)
        assert await asyncio.wait_for(streams[0].read(), 30) == b""


async def test_a_head_that_trickles_does_not_extend_its_time() -> None:
    async with listening(header_timeout=0.3) as listener:
        reader, writer = await listener.open(b"GET / HTTP/1.1\r\n")
        for _ in range(100):
            if reader.at_eof() or writer.is_closing():
                return
            writer.write(b"a: b\r\n")
            await asyncio.sleep(0.05)
        pytest.fail("the connection is still open after 5 seconds")


async def test_a_request_in_progress_and_its_body_are_not_timed_as_a_head() -> None:
    async with listening(header_timeout=0.3) as listener:
        slow = await listener.open(REQUEST.replace(b"/ ", b"/slow ", 1))
        body = await listener.open(HALF_SENT)
        assert await is_answered(slow)
        body[1].write(b"a" * 99)
        assert await is_answered(body)


@pytest.mark.parametrize("data", [b"", HALF_SENT, REQUEST], ids=["silent", "half a body", "kept alive"])
async def test_a_new_connection_replaces_the_most_silent_one(data: bytes) -> None:
    async with listening(max_connections=3) as listener:
        silent = [await listener.open(data) for _ in range(3)]
        if data == REQUEST:
            assert all([await is_answered(streams) for streams in silent])
        assert await is_answered(await listener.open(REQUEST))
        await asyncio.sleep(0.05)
        if data == REQUEST:
            await asyncio.gather(*(streams[0].readuntil(b"ok") for streams in silent))
        assert [await is_open(streams) for streams in silent] == [False, True, True]


async def test_a_new_connection_replaces_one_whose_client_does_not_read() -> None:
    async with listening(max_connections=3) as listener:
        for _ in range(3):
            await listener.open(LARGE)
        await asyncio.sleep(0.2)  # until the buffers are full
        assert await is_answered(await listener.open(REQUEST))


async def test_of_clients_that_do_not_read_the_one_that_read_last_is_kept() -> None:
    async with listening(max_connections=2) as listener:
        reading, silent = [await listener.open(LARGE) for _ in range(2)]
        await asyncio.sleep(0.2)
        await reading[0].readexactly(32 * 2**20)
        assert await is_answered(await listener.open(REQUEST))
        assert len(await asyncio.wait_for(reading[0].read(), 30)) > 31 * 2**20
        received = b""
        with suppress(ConnectionResetError):
            received = await asyncio.wait_for(silent[0].read(), 30)
        assert len(received) < 64 * 2**20


async def test_a_request_in_progress_is_never_replaced() -> None:
    async with listening(max_connections=2) as listener:
        slow = [await listener.open(REQUEST.replace(b"/ ", b"/slow ", 1)) for _ in range(2)]
        assert not await is_open(await listener.open())
        assert all([await is_answered(streams) for streams in slow])


def exchange(port: int, body: bytes, repeats: int) -> bytes:
    """Send a request that is refused and its whole body, and return what the server responds."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"POST /refused HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (repeats * len(body)))
        for _ in range(repeats):
            client.sendall(body)
        response = b""
        while received := client.recv(2**16):
            response += received
        return response


async def test_a_client_that_first_sends_its_whole_body_reads_the_refusal() -> None:
    async with listening() as listener:
        responses = await asyncio.gather(
            *(asyncio.to_thread(exchange, listener.port, bytes(2**20), num_mib) for num_mib in (1, 8, 16))
        )
    assert all(response.startswith(b"HTTP/1.1 413") and response.endswith(b"no") for response in responses)


async def test_a_body_without_end_is_dropped_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "DROP_SECONDS", 0.3)
    async with listening() as listener:
        with pytest.raises(ConnectionError):
            await asyncio.to_thread(exchange, listener.port, bytes(2**20), 200)
        assert await is_answered(await listener.open(REQUEST))


async def write_bytes(writer: asyncio.StreamWriter, number: int) -> None:
    for _ in range(number):
        writer.write(b"a")
        await writer.drain()
        await asyncio.sleep(0.01)


async def test_a_silent_client_after_a_refusal_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "DROP_SECONDS", 0.3)
    async with listening() as listener:
        reader, writer = await listener.open(HALF_SENT.replace(b"/ ", b"/refused ", 1))
        assert (await asyncio.wait_for(reader.read(), 30)).startswith(b"HTTP/1.1 413")
        await asyncio.sleep(0.5)
        with pytest.raises(ConnectionError):  # the server has aborted it
            await write_bytes(writer, 100)


@pytest.mark.parametrize("length", [b"Transfer-Encoding: chunked", b"Content-Length: %d" % (SHORT_BODY + 1)])
async def test_a_response_before_the_end_of_its_body_ends_the_connection(length: bytes) -> None:
    async with listening() as listener:
        reader, _ = await listener.open(b"POST /unread HTTP/1.1\r\nHost: a\r\n" + length + b"\r\n\r\n")
        response = await asyncio.wait_for(reader.read(), 30)
    assert response.startswith(b"HTTP/1.1 404")
    assert b"\r\nconnection: close\r\n" in response.lower()


async def test_after_a_refusal_a_short_body_is_read_and_the_next_request_answered() -> None:
    async with listening() as listener:
        streams = await listener.open(HALF_SENT.replace(b"/ ", b"/unread ", 1))
        head = await asyncio.wait_for(streams[0].readuntil(b"\r\n\r\n"), 30)
        assert b"close" not in head
        assert await streams[0].readexactly(2) == b"no"
        streams[1].write(b"a" * 99 + REQUEST)
        assert await is_answered(streams)


async def test_a_body_in_chunks_of_one_byte_is_refused_and_the_refusal_can_be_read() -> None:
    def send_all(port: int) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(CHUNKED + b"1\r\n \r\n" * 300_000)
            response = b""
            while received := client.recv(2**16):
                response += received
            return response

    async with listening() as listener:
        response = await asyncio.to_thread(send_all, listener.port)
        assert response.startswith(b"HTTP/1.1 400")
        head, body = response.split(b"\r\n\r\n", 1)
        assert b"content-type: application/json" in head.lower()
        message = "Invalid HTTP request received. The body has too many chunks of less than 256 bytes."
        expected = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_value"}
        assert json.loads(body) == {"error": expected}
        assert await is_answered(await listener.open(REQUEST))


async def test_a_body_in_chunks_of_the_least_size_is_read() -> None:
    chunk = b"%x\r\n%b\r\n" % (CHUNK_BYTES, bytes(CHUNK_BYTES))
    async with listening() as listener:
        streams = await listener.open(CHUNKED + chunk * 10 * FREE_CHUNKS + b"1\r\n \r\n" * 1000 + b"0\r\n\r\n")
        assert await is_answered(streams)


async def test_a_head_of_many_lines_is_refused_and_a_body_of_many_lines_is_not() -> None:
    head = REQUEST.removesuffix(b"\r\n")
    async with listening() as listener:
        assert await is_answered(await listener.open(head + b"a:\r\n" * (MAX_LINES - 1) + b"\r\n"))
        reader, _ = await listener.open(head + b"a:\r\n" * MAX_LINES + b"\r\n")
        refusal = await asyncio.wait_for(reader.read(), 30)
        assert refusal.count(b" The head has more than 200 header lines.") == 1
        body = b"\n" * 1000
        post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
        assert await is_answered(await listener.open(post + body))


@pytest.mark.parametrize("path", [b"/", b"/unread", b"/refused"])
async def test_a_chunk_that_is_none_is_refused_without_an_error(path: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as listener:
        reader, _ = await listener.open(CHUNKED.replace(b"/ ", path + b" ", 1) + b"zz\r\n")
        assert (await asyncio.wait_for(reader.read(), 30)).startswith(b"HTTP/1.1 400")
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


async def test_a_chunk_that_is_none_ends_a_response_that_has_begun(caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as listener:
        reader, writer = await listener.open(CHUNKED.replace(b"/ ", b"/early ", 1))
        assert (await asyncio.wait_for(reader.readline(), 30)).startswith(b"HTTP/1.1 200")
        writer.write(b"zz\r\n")
        await asyncio.wait_for(reader.read(), 30)
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


async def test_a_body_that_ends_early_is_a_disconnection(caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as listener:
        reader, writer = await listener.open(HALF_SENT)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 30) == b""
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
async def test_a_request_for_another_protocol_is_answered_in_this_one(
    protocol: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: %b\r\nSec-WebSocket-Key: a\r\n\r\n" % protocol
    async with listening() as listener:
        assert await is_answered(await listener.open(REQUEST.removesuffix(b"\r\n") + upgrade))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
