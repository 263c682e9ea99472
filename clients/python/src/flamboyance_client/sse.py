"""A parser of server-sent events, for completion streams: it takes bytes and returns the data of complete events.

Lines end at CR, LF or CRLF and nowhere else. `str.splitlines` would also split at U+2028, which JSON may hold unescaped, so
the bytes are split before they are decoded. Comments, which keep an idle connection open, and other fields are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator


class EventParser:
    """Parses the events of one stream."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> Iterator[str]:
        """Return the data of each event that these bytes complete."""
        buffered = self._rest + received
        # A CR at the end may be the first half of a CRLF, so it is held back until the next bytes.
        held = buffered[-1:] if buffered.endswith(b"\r") else b""
        *lines, rest = buffered.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = rest + held
        for line in lines:
            if line:
                self._add_line(line)
            elif self._data:
                yield b"\n".join(self._data).decode("utf-8", "replace")
                self._data = []

    def _add_line(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
