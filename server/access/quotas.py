"""Limits of API keys: the number of support sets, and quotas per minute, counted by the library `limits`.

A request is refused on arrival if a quota is used up. Its use is counted when it is known, so the last request of a minute
may exceed the quota. Each server counts separately.
"""

from __future__ import annotations

import math
import time
from typing import Literal, get_args

import msgspec
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from server.errors import QuotaExceeded

Measure = Literal["requests", "tokens", "bytes", "media"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
MINUTE = 60
MAX_LIMIT = 2**53  # JSON has no larger integer that every client reads


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The amounts that a key may use in a minute; None for no limit.

    `tokens` counts those of prompts, scored candidates and answers, `bytes` those of request bodies, `media` images and
    videos of prompts. `support_sets` is not per minute: with this key, sets can be created only while the tenant has fewer.
    """

    requests: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    media: int | None = None
    support_sets: int | None = None


LIMITS = tuple(field.name for field in msgspec.structs.fields(Limits))


class Quotas:
    """The use of all keys in the current minute."""

    def __init__(self) -> None:
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def of(self, key: str, limits: Limits) -> Quota:
        return Quota(self._limiter, key, limits)


class Quota:
    """The remaining amounts of a key in the current minute."""

    def __init__(self, limiter: FixedWindowRateLimiter, key: str, limits: Limits) -> None:
        self._limiter = limiter
        self._key = key
        self._limits: dict[str, int] = {
            name: limit for name in MEASURES if (limit := getattr(limits, name)) is not None
        }

    def begin(self) -> None:
        """Count a request. Raises `QuotaExceeded` if a limit is reached."""
        for measure, limit in self._limits.items():
            item = _item(measure, limit)
            if not self._limiter.test(item, self._key):
                end = self._limiter.get_window_stats(item, self._key).reset_time
                retry_after = max(math.ceil(end - time.time()), 1)
                if retry_after > MINUTE:  # the clock was set back
                    self._limiter.clear(item, self._key)
                    continue
                raise QuotaExceeded(f"this key may use {limit} {measure} per minute", retry_after=retry_after)
        self.count("requests", 1)

    def count(self, measure: Measure, amount: int) -> None:
        """Count what a request of this key has used."""
        limit = self._limits.get(measure)
        if limit is not None and amount:
            self._limiter.hit(_item(measure, limit), self._key, cost=amount)


def _item(measure: str, limit: int) -> RateLimitItemPerMinute:
    return RateLimitItemPerMinute(limit, namespace=measure)
