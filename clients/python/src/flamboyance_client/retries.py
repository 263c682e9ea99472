"""When a refused request is sent again, and after how long.

Only what leaves no work under way is repeated: a refusal for now (429, 503) and a connection that was never made.
A server that names a time is taken at its word; one that asks for more patience than `max_delay` gets no second try.
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
    """`limit` tries after the first; 0 turns them off."""

    limit: int = 2
    first_delay: float = 0.5
    max_delay: float = 30.0

    def delay(self, tries: int, error: FlamboyanceError) -> float | None:
        """Seconds to wait after that many failed tries, the last with `error`; None: give up."""
        if tries > self.limit or not isinstance(error, Unavailable | NotConnected):
            return None
        asked = error.retry_after if isinstance(error, Unavailable) else None
        if asked is not None:
            return asked if asked <= self.max_delay else None
        # half fixed, half random, so that clients refused together do not return together
        ceiling = min(self.first_delay * 2.0 ** (tries - 1), self.max_delay)
        return ceiling / 2 + random.uniform(0, ceiling / 2)


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds from `retry-after-ms` or `retry-after` (seconds or a date); None if neither says anything."""
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
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max((date - now).total_seconds(), 0.0)
