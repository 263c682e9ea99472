"""Limits of requests that are quickly sent and slowly read; a request as it is sent to a proxy is one to this server."""

from __future__ import annotations

import itertools
from contextlib import suppress

import h11
import pytest

from server.limits.framing import CHUNK_BYTES, FREE_CHUNKS, MAX_BYTES, Framing

CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
ONE_BYTE = b"1\r\n \r\n"


def received(data: bytes) -> tuple[Framing, h11.Request]:
    framing = Framing()
    framing.receive_data(data)
    request = framing.next_event()
    assert isinstance(request, h11.Request)
    return framing, request


def num_pieces(framing: Framing) -> int:
    """Return the number of pieces of a body until a refusal."""
    for count in itertools.count():
        try:
            assert isinstance(framing.next_event(), h11.Data)
        except h11.RemoteProtocolError:
            return count
    raise AssertionError("the body has no end")


def test_a_read_of_small_chunks_ends_after_some_of_them() -> None:
    framing, _ = received(CHUNKED + ONE_BYTE * 2**16)
    assert num_pieces(framing) <= FREE_CHUNKS * (1 + 2 / CHUNK_BYTES)


def test_large_chunks_do_not_earn_small_ones_without_end() -> None:
    framing, _ = received(CHUNKED + b"%x\r\n%b\r\n" % (2**22, bytes(2**22)) + ONE_BYTE * 2**16)
    assert num_pieces(framing) <= FREE_CHUNKS * (1 + 2 / CHUNK_BYTES)


LINE = b"X: y\r\n"


@pytest.mark.parametrize("pieces", [1, 2, 70_000])
@pytest.mark.parametrize("chunks", [b"", b"3\r\nabc\r\n"])
@pytest.mark.parametrize("end", [b"0\r\n", b"000;a=b\r\n"])
@pytest.mark.parametrize(("num_lines", "is_refused"), [(0, False), (200, False), (202, True), (10_000, True)])
def test_a_trailer_of_many_lines_is_refused(
    pieces: int, chunks: bytes, end: bytes, num_lines: int, is_refused: bool
) -> None:
    framing, _ = received(CHUNKED)
    data = chunks + end + LINE * num_lines + b"\r\n"
    size = -(-len(data) // pieces)
    try:
        for first in range(0, min(len(data), 3000), size):
            framing.receive_data(data[first : first + size])
            while (event := framing.next_event()) is not h11.NEED_DATA and not isinstance(event, h11.EndOfMessage):
                pass
    except h11.RemoteProtocolError:
        assert is_refused
        assert framing.fault == "The body has more than 200 trailer lines."
    else:
        assert not is_refused
        assert isinstance(event, h11.EndOfMessage)


def test_a_trailer_of_many_lines_is_refused_after_any_part_of_a_chunk() -> None:
    data = b"3\r\nabc\r\n0\r\n" + LINE * 202 + b"\r\n"
    for end in range(1, 14):
        framing, _ = received(CHUNKED)
        with suppress(h11.RemoteProtocolError):
            for piece in (data[:end], data[end:]):
                framing.receive_data(piece)
                while isinstance(framing.next_event(), h11.Data):
                    pass
        assert framing.fault == "The body has more than 200 trailer lines.", end


@pytest.mark.parametrize("piece", [2**20, 1400, 1])
@pytest.mark.parametrize("extra", [0, 1])
def test_the_size_of_a_head_has_a_limit_however_it_is_divided(piece: int, extra: int) -> None:
    end = b" HTTP/1.1\r\nHost: a\r\n\r\n"
    data = b"GET /?id=".ljust(MAX_BYTES - len(end) + extra, b"a") + end
    framing = Framing()
    event: object = h11.NEED_DATA
    try:
        for first in range(0, len(data), piece):
            framing.receive_data(data[first : first + piece])
            event = framing.next_event()
    except h11.RemoteProtocolError:
        assert extra
        assert framing.fault == "The head has more than 16384 bytes of header lines."
    else:
        assert not extra
        assert isinstance(event, h11.Request)


def test_the_head_after_an_empty_trailer_is_none() -> None:
    framing, _ = received(CHUNKED)
    framing.receive_data(b"0\r\n")
    assert framing.next_event() is h11.NEED_DATA
    framing.receive_data(b"\r\n" + CHUNKED[:-2] + LINE * 199)
    assert isinstance(framing.next_event(), h11.EndOfMessage)


@pytest.mark.parametrize(("lengths", "is_last"), [(b"", False), (b"Content-Length: 5\r\n", True)])
def test_a_body_of_two_lengths_is_the_last_of_its_connection(lengths: bytes, is_last: bool) -> None:
    framing, _ = received(CHUNKED.replace(b"Transfer", lengths + b"Transfer") + b"0\r\n\r\n")
    assert isinstance(framing.next_event(), h11.EndOfMessage)
    sent = framing.send(h11.Response(status_code=400, headers=[(b"content-length", b"0")]))
    framing.send(h11.EndOfMessage())
    assert (b"connection: close" in sent, framing.our_state is h11.MUST_CLOSE) == (is_last, is_last)


def test_a_chunk_that_looks_like_a_trailer_is_read() -> None:
    text = b"0\r\n" + LINE * 1000
    framing, _ = received(CHUNKED + b"%x\r\n" % len(text) + text[:100])
    assert framing.next_event().data == text[:100]
    for chunk in (text[100:300], text[300:]):
        framing.receive_data(chunk)
        assert framing.next_event().data == chunk
    framing, _ = received(CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(text), text))
    assert framing.next_event().data == text
    assert isinstance(framing.next_event(), h11.EndOfMessage)


def test_much_is_read_at_once_only_of_large_pieces() -> None:
    framing, _ = received(CHUNKED + b"%x\r\n%b\r\n" % (2**16, bytes(2**16)) + ONE_BYTE)
    pieces = []
    for _ in range(2):
        framing.next_event()
        pieces.append(framing.is_coarse)
    assert pieces == [True, False]


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        (b"http://localhost/health/live", b"/health/live", b"localhost"),
        (b"HTTPS://b:8000/a?b=http://c/", b"/a?b=http://c/", b"b:8000"),
        (b"http://localhost", b"/", b"localhost"),
        (b"http://localhost?a=/", b"/?a=/", b"localhost"),
        (b"/http://b/", b"/http://b/", b"a"),
        (b"http:///x", b"http:///x", b"a"),
    ],
)
def test_a_target_with_a_host_replaces_the_header(target: bytes, path: bytes, host: bytes) -> None:
    _, request = received(b"GET " + target + b" HTTP/1.1\r\nA: b\r\nHost: a\r\n\r\n")
    assert request.target == path
    assert sorted(request.headers) == [(b"a", b"b"), (b"host", host)]
