"""Counts the separators of JSON, which tell how many values it has before it is parsed. Those in texts do not count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from server.errors import BodyTooLarge

# Parsing takes much longer per value, per name of a field, and per list or object than per byte. No body of a sensible
# request has as many. A colon stands for a name.
MAX_SEPARATORS = {b",": 2**19, b":": 2**16, b"[": 2**16, b"{": 2**16}
WORDS = {b",": "commas", b":": "names of fields", b"[": "lists", b"{": "objects"}
# Parsing a text takes much longer per escape than per byte, and no other thread runs meanwhile.
ESCAPE = b"\\"
MAX_ESCAPES = 2**22
# Outside of texts, numbers of many digits take longest per byte. The largest list of token ids has fewer bytes.
MAX_PLAIN_BYTES = 2**22
# bytes that are read in one call of a few milliseconds, after which other threads run
SLICE = 2**18


def check_separators(
    data: bytes, limits: Mapping[bytes, int], name: str, counted: Counter[bytes] | None = None
) -> None:
    """Check the numbers of separators in a part of a request, which `name` stands for. Raises `BodyTooLarge`.

    Its bytes outside of texts are limited as well, and the escapes of a request in one part. `counted`: the numbers in
    earlier data of the same part, to which those in `data` are added.
    """
    if counted is None:
        if has_at_least(MAX_ESCAPES + 1, ESCAPE, data):
            raise BodyTooLarge(f"{name} has more than {MAX_ESCAPES} backslashes")
        is_small = len(data) <= MAX_PLAIN_BYTES
        if is_small and not any(has_at_least(limit + 1, mark, data) for mark, limit in limits.items()):
            return  # even with those in texts, which takes less time
    numbers, num_bytes = Counter[bytes]() if counted is None else counted, 0
    for piece in _without_texts(data):
        num_bytes += len(piece)
        if num_bytes > MAX_PLAIN_BYTES:
            raise BodyTooLarge(f"{name} has more than {MAX_PLAIN_BYTES} bytes outside of texts")
        for separator, limit in limits.items():
            numbers[separator] += piece.count(separator)
            if numbers[separator] > limit:
                raise BodyTooLarge(f"{name} has more than {limit} {WORDS[separator]}")


def has_at_least(number: int, mark: bytes, data: bytes) -> bool:
    """Return whether a byte occurs at least this many times in data.

    The replacement stops at that number. Where the byte is rare, as in pictures, it is ten times faster than `bytes.count`.
    """
    left = number
    for start in range(0, len(data), SLICE):
        if left <= 0:
            break
        piece = data[start : start + SLICE]
        left -= len(piece) - len(piece.replace(mark, b"", left))
    return left <= 0


def _without_texts(data: bytes) -> Iterator[bytes]:
    """Yield what is outside of the texts of JSON, in pieces; of other data, at least what is before the first error."""
    is_in_text, escape = 0, b""
    for start in range(0, len(data), SLICE):
        # without what is escaped, each quotation mark is the beginning or the end of a text
        piece = (escape + data[start : start + SLICE]).replace(rb"\\", b"").replace(rb"\"", b"")
        escape = b"\\" if piece.endswith(b"\\") else b""
        parts = piece.split(b'"')
        yield b"".join(parts[is_in_text::2])
        is_in_text = (is_in_text + len(parts) - 1) % 2
