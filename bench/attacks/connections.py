"""Attacks below the requests: connections that are idle, slow, half-sent, unread, or that speak HTTP ambiguously."""

from __future__ import annotations

import http.client
import io
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import Image

from bench.attacks.attack import Attack, Session
from bench.driver import BenchFailed
from bench.target import JSON_HEADERS, Answer, Request, Target, encoded, get, post, text_request
from server.media import source

LARGE_BODY = 60 * 2**20
HELD_SECONDS = 600.0
# connections that send a small request again and again, and how often in a round
NUM_REPEATING, NUM_REPEATED = 64, 50
BODY = b'{"prompt":"a","max_tokens":1}'
BOTH_LENGTHS = (
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
)


def _hold(session: Session, data: bytes, num_connections: int) -> None:
    """Open connections, send the same bytes on each, and wait."""
    connections = []
    for _ in range(num_connections):
        if session.is_over:
            break
        connections.append(session.connect(data))
    session.sleep(HELD_SECONDS)
    for connection in connections:
        session.close(connection)


def _half_sent(session: Session) -> None:
    _hold(session, encoded(text_request())[:-10], 256)


def _silent(session: Session) -> None:
    _hold(session, b"", 600)


def _half_headers(session: Session) -> None:
    _hold(session, encoded(text_request())[:40], 256)


def _large_bodies(session: Session) -> None:
    """Send all but the last byte of large bodies."""
    head = encoded(text_request())
    start = head[: head.index(b"Content-Length")] + f"Content-Length: {LARGE_BODY}\r\n\r\n".encode()
    _hold(session, start + b" " * (LARGE_BODY - 1), 20)


def _slow_bodies(session: Session) -> None:
    """Send bodies byte by byte."""
    body = encoded(text_request())
    connections = [session.connect(body[:-60]) for _ in range(200)]
    for byte in body[-60:-1]:
        for connection in connections:
            with suppress(OSError):
                if connection is not None:
                    connection.send(bytes([byte]))
        session.sleep(1.0)
    for connection in connections:
        session.close(connection)


def _unread_streams(session: Session) -> None:
    """Ask for long streams with log-probabilities and read nothing of them."""
    request = text_request(2000, n=8, temperature=1.0, stream=True, logprobs=20)
    _hold(session, encoded(request), 16)


def _store_large_picture(target: Target) -> None:
    answer = target.send(Request(path="/v1/images", body=_large_picture(), headers={"Content-Type": "image/png"}))
    if answer.status != 200:
        raise BenchFailed(f"the picture was not stored: {answer.status} {answer.body[:500]!r}{answer.error}")


def _delete_large_picture(target: Target) -> None:
    target.send(Request(method="DELETE", path=f"/v1/images/{_picture_id()}"))


def _unread_downloads(session: Session) -> None:
    """Download a large picture many times and read nothing of it."""
    _hold(session, encoded(get(f"/v1/images/{_picture_id()}/content")), 200)


@cache
def _large_picture() -> bytes:
    """Return a PNG file of 12 MB."""
    file, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    return file.getvalue()


@cache
def _picture_id() -> str:
    return source.encoded(_large_picture(), "image", "").id


def _reconnect(session: Session) -> None:
    """Open and close connections as fast as possible, some of them in the middle of a request."""
    data = encoded(text_request())
    for number in range(2000):
        if session.is_over:
            return
        session.close(session.connect(data[: len(data) * (number % 3) // 3]))


def _both_lengths(session: Session) -> None:
    """Announce the length of a body twice, differently: two programs in a row would read two requests from it."""
    _answer(session, BOTH_LENGTHS)


def _large_headers(session: Session) -> None:
    head = encoded(get("/v1/models")).removesuffix(b"\r\n")
    for number in range(64):
        _answer(session, head + b"X-A: " + b"a" * 2 ** (10 + number % 10) + b"\r\n\r\n")


def _small_chunks(session: Session) -> None:
    """Send bodies in chunks of one byte without end, half of them to a route that there is not."""
    chunks = b"1\r\n \r\n" * 200_000
    for path in ("/v1/completions", "/nowhere"):
        head = encoded(Request(path=path, headers=JSON_HEADERS)).replace(
            b"Content-Length: 0", b"Transfer-Encoding: chunked"
        )
        _answer(session, head + chunks)


def _many_names(session: Session) -> None:
    names = "&".join(f"{number:x}" for number in range(13_000))
    _answer(session, encoded(get(f"/v1/images?{names}")))


def _again_and_again(request: Request) -> Callable[[Session], None]:
    """Return a round in which each of many connections sends a small request, and the next one after the answer."""
    data = encoded(request)

    def send(session: Session) -> None:
        if (connection := session.connect()) is None:
            return
        with suppress(OSError, http.client.HTTPException):
            for _ in range(NUM_REPEATED):
                connection.sendall(data)
                answer = _read(connection)
                if not session.is_over:
                    session.answers.append(answer)
        session.close(connection)

    def run(session: Session) -> None:
        with ThreadPoolExecutor(NUM_REPEATING) as clients:
            list(clients.map(send, [session] * NUM_REPEATING))

    return run


def _answer(session: Session, data: bytes) -> None:
    """Send bytes and read the answer, which does not count if the session has ended meanwhile."""
    answer = _raw(session, data)
    if not session.is_over:
        session.answers.append(answer)


def _raw(session: Session, data: bytes) -> Answer:
    connection = session.connect(data)
    if connection is None:
        return Answer(status=0, seconds=0.0, error="refused")
    try:
        return _read(connection)
    except (TimeoutError, OSError, http.client.HTTPException) as error:
        return Answer(status=0, seconds=0.0, error=type(error).__name__)
    finally:
        session.close(connection)


def _read(connection: socket.socket) -> Answer:
    response = http.client.HTTPResponse(connection)
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(status=response.status, seconds=0.0, body=response.read(), headers=headers)


ATTACKS = (
    Attack(name="256 half-sent requests", severity="critical", run=_half_sent),
    Attack(name="256 half-sent headers", severity="high", run=_half_headers),
    Attack(name="600 silent connections", severity="medium", run=_silent),
    Attack(name="20 held bodies of 60 MB", severity="medium", run=_large_bodies),
    Attack(name="200 slow bodies", severity="medium", run=_slow_bodies),
    Attack(name="16 unread streams", severity="medium", run=_unread_streams),
    Attack(
        name="200 unread downloads of 12 MB",
        severity="medium",
        run=_unread_downloads,
        prepare=_store_large_picture,
        clean=_delete_large_picture,
    ),
    Attack(name="connections without end", severity="medium", run=_reconnect),
    Attack(name="bodies in chunks of one byte", severity="high", run=_small_chunks, is_refused=True),
    Attack(name="query of 13,000 names", severity="high", run=_many_names, is_refused=True),
    Attack(
        name="64 connections of refused requests",
        severity="high",
        run=_again_and_again(post("/v1/completions", prompt="a", max_tokens=-1)),
        is_refused=True,
    ),
    Attack(name="64 connections of small answers", severity="high", run=_again_and_again(get("/v1/models"))),
    Attack(name="two lengths of one body", severity="low", run=_both_lengths, is_refused=True),
    Attack(name="large headers", severity="low", run=_large_headers),
)
