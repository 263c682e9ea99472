"""Limits of requests that are quickly sent and slowly read; a request as it is sent to a proxy is one to this server."""

from __future__ import annotations

import itertools

import h11
import pytest

from server.limits.framing import CHUNK_BYTES, FREE_CHUNKS, Framing

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
