"""Tests of the retry policy. Its functions are pure, so no test waits."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from flamboyance_client import BadRequest, FlamboyanceError, NotConnected, Retries, ServerFault, TimedOut, Unavailable
from flamboyance_client.errors import Refusal
from flamboyance_client.retries import retry_after, should_retry

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def busy(seconds: float | None, status: int = 503, should_retry: bool | None = None) -> Unavailable:
    return Unavailable(Refusal(message="busy", status=status, retry_after=seconds, should_retry=should_retry))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "3", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 2026 12:00:07 GMT"}, 7.0),
        ({"retry-after": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
    ],
    ids=str,
)
def test_retry_after_is_parsed(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, NOW) == seconds


def test_the_stated_delay_is_used_up_to_the_maximum() -> None:
    assert Retries().delay(1, busy(3.5)) == 3.5
    assert Retries().delay(1, busy(60.0)) == 60.0  # the window of a quota
    assert Retries(max_delay=3.0).delay(1, busy(3.5)) is None


def test_delays_grow_to_the_limit() -> None:
    retries = Retries(limit=9, first_delay=1.0, max_delay=5.0)
    for tries, ceiling in enumerate([1.0, 2.0, 4.0, 5.0, 5.0], start=1):
        delay = retries.delay(tries, busy(None))
        assert delay is not None
        assert ceiling / 2 <= delay <= ceiling


def test_the_number_of_retries_is_limited() -> None:
    assert Retries(limit=2).delay(2, busy(0.0)) == 0.0
    assert Retries(limit=2).delay(3, busy(0.0)) is None
    assert Retries(limit=0).delay(1, busy(0.0)) is None


@pytest.mark.parametrize(
    ("headers", "stated"),
    [
        ({}, None),
        ({"x-should-retry": "true"}, True),
        ({"x-should-retry": "False"}, False),
        ({"x-should-retry": "perhaps"}, None),
    ],
    ids=str,
)
def test_should_retry_is_parsed(headers: dict[str, str], stated: bool | None) -> None:
    assert should_retry(headers) is stated


@pytest.mark.parametrize("status", [408, 429, 503])
def test_a_request_is_not_retried_against_the_servers_word(status: int) -> None:
    assert Retries().delay(1, busy(1.0, status)) == 1.0
    assert Retries().delay(1, busy(1.0, status, should_retry=True)) == 1.0
    assert Retries().delay(1, busy(1.0, status, should_retry=False)) is None


@pytest.mark.parametrize(
    ("error", "is_retried"),
    [(NotConnected("refused"), True), (busy(1.0, 408), True), (busy(1.0, 429), True), (busy(1.0, 503), False)],
    ids=str,
)
def test_a_call_that_must_not_run_twice_is_retried_only_if_it_did_not_run(
    error: FlamboyanceError, is_retried: bool
) -> None:
    assert (Retries().delay(1, error, can_run_twice=False) is not None) == is_retried


@pytest.mark.parametrize(
    ("error", "is_retried"),
    [
        (NotConnected("refused"), True),
        (TimedOut("the server may have started"), False),
        (ServerFault(Refusal(message="bug", status=500)), False),
        (BadRequest(Refusal(message="bad", status=400)), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_requests_that_were_not_started_are_retried(error: FlamboyanceError, is_retried: bool) -> None:
    assert (Retries().delay(1, error) is not None) == is_retried
