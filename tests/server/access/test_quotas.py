"""Quotas of keys: refused when used up, counted with what a request turned out to use, and free again after a minute."""

from __future__ import annotations

import time

import pytest

from server.access.quotas import Limits, Quotas
from server.errors import QuotaExceeded


def test_requests_up_to_the_limit() -> None:
    quota = Quotas().of("key", Limits(requests=3))
    for _ in range(3):
        quota.begin()
    with pytest.raises(QuotaExceeded, match="3 requests per minute") as caught:
        quota.begin()
    assert 1 <= caught.value.retry_after <= 60


def test_what_a_request_used_counts_for_the_next_one() -> None:
    quota = Quotas().of("key", Limits(tokens=100))
    quota.begin()
    quota.count("tokens", 500)  # more than the limit, and known only now
    with pytest.raises(QuotaExceeded, match="100 tokens"):
        quota.begin()


def test_a_refused_request_is_not_counted() -> None:
    quota = Quotas().of("key", Limits(requests=5, media=1))
    quota.count("media", 1)
    for _ in range(10):
        with pytest.raises(QuotaExceeded, match="1 media"):
            quota.begin()


def test_keys_do_not_share_their_quotas() -> None:
    quotas = Quotas()
    quotas.of("a", Limits(requests=1)).begin()
    quotas.of("b", Limits(requests=1)).begin()
    with pytest.raises(QuotaExceeded):
        quotas.of("a", Limits(requests=1)).begin()  # made anew for each request of a key


def test_a_minute_later_the_quota_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    quota = Quotas().of("key", Limits(requests=1))
    quota.begin()
    with pytest.raises(QuotaExceeded):
        quota.begin()
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    quota.begin()


def test_a_clock_that_is_set_back_makes_no_minute_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    quota = Quotas().of("key", Limits(requests=1))
    quota.begin()
    earlier = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: earlier)
    quota.begin()
    with pytest.raises(QuotaExceeded) as caught:
        quota.begin()
    assert caught.value.retry_after <= 60


def test_without_limits_nothing_is_counted() -> None:
    quota = Quotas().of("key", Limits())
    for _ in range(1000):
        quota.begin()
        quota.count("tokens", 10**9)
