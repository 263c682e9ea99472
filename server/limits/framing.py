"""HTTP/1.1 as this server reads it: h11, with limits for messages that are sent faster than they can be read.

Each line of a head and each chunk of a body takes h11 some microseconds, whatever its length. The event loop reads them
between all other work, so their numbers are limited. A body that is still unread when its response begins is not read: the
connection ends with the response.
"""

from __future__ import annotations

import re
from typing import Any

import h11

# header lines of a request, and trailer lines of its body; other servers have limits of about 100
MAX_LINES = 200
# Bytes of either, with the blank line at its end. h11 has this limit only for those that do not arrive at once.
MAX_BYTES = 2**14
# Chunks of a body: at most FREE_CHUNKS at once, and in the long run at most one per CHUNK_BYTES bytes of data.
FREE_CHUNKS = 1024
CHUNK_BYTES = 256
# Data of this size at once are no small chunks: the rest of the body is probably read as fast.
COARSE_BYTES = 4096
# A body of this declared length is read although its response has begun: the connection can carry the next request.
SHORT_BODY = 2**16

BLANK_LINE = re.compile(rb"(?:\A|\n)\r?\n")
# the header of a body's last chunk, after the end of the chunk before it, whose beginning h11 may have read
LAST_CHUNK = re.compile(rb"(?:\r?\n)?0+[ \t\r]*(?:;[^\n]*)?\n")
ABSOLUTE_FORM = re.compile(rb"https?://([^/?#]+)(.*)", re.IGNORECASE)


class Framing(h11.Connection):
    """A connection of h11 as a server. `fault` says which limit a refused request exceeds, '' if it is no HTTP.

    `is_coarse`: the latest data of a body came in a large piece, so many bytes may be read at once.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=MAX_BYTES)
        self.fault = ""
        self.is_coarse = False
        self._is_short = True
        # a proxy may take another end for that of the body, and the bytes after it for a request (RFC 9112, 6.1)
        self._is_ambiguous = False
        self._free_chunks = 0.0
        self._is_chunk_next = False  # the next bytes of a body begin a chunk
        self._is_trailer_next = False

    def next_event(self) -> Any:
        """Return the next event, as h11 does. Raises `h11.RemoteProtocolError` also for a limit."""
        if self.their_state is h11.IDLE:
            self._check_part("head", "header")
        elif self.their_state is h11.SEND_BODY and self._is_chunk_next:
            self._check_trailer()
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._begin(event)
            return _in_origin_form(event)
        if isinstance(event, h11.Data):
            self._count(event)
        return event

    def send(self, event: h11.Event) -> Any:
        """Return the bytes of an event; a response to an unread or ambiguous body ends the connection, and says so."""
        is_unread = self.their_state is h11.SEND_BODY and not self._is_short
        if isinstance(event, h11.Response) and (is_unread or self._is_ambiguous):
            headers = [(name, value) for name, value in event.headers if name != b"connection"]
            event = h11.Response(
                status_code=event.status_code, headers=[*headers, (b"connection", b"close")], reason=event.reason
            )
        return super().send(event)

    def _check_part(self, part: str, kind: str, first: int = 0) -> None:
        """Check the size and the number of lines of the head or trailer that arrives, before h11 reads them."""
        received, _ = self.trailing_data
        if received.count(b"\n", first) > MAX_LINES:
            end = BLANK_LINE.search(received, max(first - 1, 0))
            if received.count(b"\n", first, end.start() if end else len(received)) > MAX_LINES:
                raise self._refused(f"The {part} has more than {MAX_LINES} {kind} lines.")
        last = first + MAX_BYTES
        if len(received) > last and not BLANK_LINE.search(received, max(first - 1, 0), last):
            raise self._refused(f"The {part} has more than {MAX_BYTES} bytes of {kind} lines.")

    def _check_trailer(self) -> None:
        received, _ = self.trailing_data
        last_chunk = None if self._is_trailer_next else LAST_CHUNK.match(received)
        if last_chunk or self._is_trailer_next:
            self._is_trailer_next = True
            self._check_part("body", "trailer", last_chunk.end() if last_chunk else 0)

    def _begin(self, request: h11.Request) -> None:
        headers = dict(request.headers)
        length = int(headers.get(b"content-length", 0))
        self._is_short = b"transfer-encoding" not in headers and length <= SHORT_BODY
        self._is_ambiguous = b"transfer-encoding" in headers and b"content-length" in headers
        self._free_chunks, self.is_coarse = FREE_CHUNKS, False
        self._is_chunk_next, self._is_trailer_next = b"transfer-encoding" in headers, False

    def _count(self, data: h11.Data) -> None:
        """Count the chunk that data begin, if they do."""
        self.is_coarse = len(data.data) >= COARSE_BYTES
        self._is_chunk_next = data.chunk_end
        earned = self._free_chunks + len(data.data) / CHUNK_BYTES
        self._free_chunks = min(earned, FREE_CHUNKS) - data.chunk_start
        if self._free_chunks < 0:
            raise self._refused(f"The body has too many chunks of less than {CHUNK_BYTES} bytes.")

    def _refused(self, fault: str) -> h11.RemoteProtocolError:
        self.fault = fault
        return h11.RemoteProtocolError(fault)


def _in_origin_form(request: h11.Request) -> h11.Request:
    """Return a request whose target is a path. A URL, as it is sent to proxies, has it and `Host` (RFC 9112, 3.2.2)."""
    match = ABSOLUTE_FORM.fullmatch(request.target)
    if match is None:
        return request
    host, target = match.groups()
    headers = [(name, value) for name, value in request.headers if name != b"host"]
    return h11.Request(
        method=request.method,
        target=target if target.startswith(b"/") else b"/" + target,
        headers=[(b"host", host), *headers],
        http_version=request.http_version,
    )
