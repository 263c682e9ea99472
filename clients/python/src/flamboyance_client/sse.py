"""Server-sent events, as far as a completion stream needs them: bytes in, the data of whole events out.

Lines end at CR, LF or CRLF and nowhere else (`str.splitlines` would also break at U+2028, which JSON may hold raw), so
the bytes are cut before they are decoded. Comments, which keep a quiet connection open, and other fields are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator


class EventParser:
    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> Iterator[str]:
        """The data of each event that these bytes complete."""
        buffered = self._rest + received
        # a CR at the very end may be half of a CRLF: wait for what follows
        held = buffered[-1:] if buffered.endswith(b"\r") else b""
        *lines, rest = buffered.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = rest + held
        for line in lines:
            if line:
                self._take(line)
            elif self._data:
                yield b"\n".join(self._data).decode("utf-8")
                self._data = []

    def _take(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
