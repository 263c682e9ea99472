"""The rules for retries: the errors after which a request is sent again, and the delay before that.

A request is retried after a temporary rejection (408, 429, 503) or a failed connection, unless the server states
`X-Should-Retry: false`. A call that must not run twice is not retried after a 503, since the server may have run it. The
delay that the server states is used as it is; if it exceeds `max_delay`, the request is not retried.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from flamboyance_client.errors import FlamboyanceError, NotConnected, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """The retry policy: at most `limit` retries; 0 disables them."""

    limit: int = 2
    first_delay: float = 0.5
    # the windows of quotas are a minute, after which a server may ask for some more
    max_delay: float = 65.0

    def delay(self, tries: int, error: FlamboyanceError, *, can_run_twice: bool = True) -> float | None:
        """Return the seconds to wait after `tries` failed attempts, the last with `error`, or None to give up."""
        if tries > self.limit or not _is_temporary(error, can_run_twice):
            return None
        stated = error.retry_after if isinstance(error, Unavailable) else None
        if stated is not None:
            return stated if stated <= self.max_delay else None
        # Half fixed, half random, so that clients that were rejected together do not retry together.
        ceiling = min(self.first_delay * 2.0 ** (tries - 1), self.max_delay)
        return ceiling / 2 + random.uniform(0, ceiling / 2)


def _is_temporary(error: FlamboyanceError, can_run_twice: bool) -> bool:
    if isinstance(error, Unavailable):
        return error.should_retry is not False and (can_run_twice or error.status != 503)
    return isinstance(error, NotConnected)


def should_retry(headers: Mapping[str, str]) -> bool | None:
    """Return the server's `x-should-retry`, or None if it does not state one."""
    return {"true": True, "false": False}.get(headers.get("x-should-retry", "").lower())


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the seconds of `retry-after-ms` or `retry-after` (seconds or a date), or None if neither is valid."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    if (seconds := _number(value)) is not None:
        return seconds
    return _seconds_until(value, now or datetime.now(UTC)) if value else None


def _number(value: str | None) -> float | None:
    try:
        number = float(value) if value else math.nan
    except ValueError:
        return None
    return max(number, 0.0) if math.isfinite(number) else None


def _seconds_until(value: str, now: datetime) -> float | None:
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max((date - now).total_seconds(), 0.0)
