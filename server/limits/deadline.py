"""The time limit of one request: it covers the body, the queue, decoding, encoding and every token.

It is the server's limit, or a shorter one in the request: seconds in the header `X-Request-Timeout`, or in the field
`timeout` of its body.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.errors import DeadlineExceeded, InvalidRequest

HEADER = "X-Request-Timeout"
MAX_SECONDS = 86_400


class Deadline:
    """The deadline of a request that has just arrived; `seconds` is None if there is none."""

    def __init__(self, seconds: float | None) -> None:
        self._arrived = asyncio.get_running_loop().time()
        self._seconds = seconds
        self._timeout: asyncio.Timeout | None = None

    def shorten(self, seconds: float | None) -> None:
        """Move the deadline to `seconds` after the request's arrival, unless it is earlier already."""
        if seconds is not None and (self._seconds is None or seconds < self._seconds):
            self._seconds = seconds
            if self._timeout is not None:
                self._timeout.reschedule(self._when())

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Cancel the enclosed work when the deadline passes. Raises `DeadlineExceeded`.

        An enclosing limit ends here: a stream that has begun reports its own end.
        """
        self.end()
        self._timeout = timeout = asyncio.timeout_at(self._when())
        try:
            async with timeout:
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            raise DeadlineExceeded(f"the request was not finished within {self._seconds:g} seconds") from None

    def end(self) -> None:
        """End the active limit: the response has begun, and its sender has its own limit or none."""
        if self._timeout is not None:
            self._timeout.reschedule(None)

    def _when(self) -> float | None:
        return None if self._seconds is None else self._arrived + self._seconds


def read_header(value: str | None) -> float | None:
    """Return the seconds of the header, None without it. Raises `InvalidRequest`."""
    if value is None:
        return None
    try:
        seconds = 0.0 if "_" in value else float(value)  # Python reads 1_0 as 10
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_SECONDS:
        message = f"{HEADER}: {value[:64]!r} is not a number of seconds above 0 and up to {MAX_SECONDS}"
        raise InvalidRequest(message, param=HEADER)
    return seconds
