"""A limit that clients share: what one client can get, how busy clients converge, and the two kinds of refusals."""

from __future__ import annotations

from collections import Counter

import pytest

from server.errors import ClientOverShare, Overloaded
from server.limits.shared_limit import SharedLimit


def allows(limit: SharedLimit, client: str) -> bool:
    try:
        limit.check(client)
    except Overloaded:
        return False
    return True


def test_clients_converge_to_equal_shares_of_a_limit() -> None:
    limit, held = SharedLimit(256, 0.75, "requests"), Counter[str]()
    while clients := [client for client in ("a", "b", "c") if allows(limit, client)]:
        limit.take(clients[0] if held["a"] < 192 else clients[-1])
        held[clients[0] if held["a"] < 192 else clients[-1]] += 1
    assert held["a"] == 192
    assert 16 <= held["c"] <= 64
    assert limit.used < 256
    for _ in range(192):
        limit.release("a")
    assert allows(limit, "b")


def test_a_full_limit_and_a_client_over_its_share_are_refused_differently() -> None:
    limit = SharedLimit(8, 0.5, "slots that are few", lambda: 7)
    limit.take("a", 4)
    with pytest.raises(ClientOverShare, match="this client has its share of the 8 slots that are few") as over_share:
        limit.check("a", closes=True)
    assert over_share.value.status == 429
    assert over_share.value.headers().items() >= {"Retry-After": "7", "Connection": "close"}.items()
    with pytest.raises(Overloaded, match="the limit of 8 slots that are few is reached") as full:
        limit.check("b", 5, closes=True)
    assert full.value.status == 503
    assert full.value.headers().items() >= {"Retry-After": "7", "Connection": "close"}.items()
    limit.check("b", 2)


def test_a_share_counts_what_a_client_would_hold() -> None:
    """Otherwise one large amount takes what the limit leaves for others."""
    limit = SharedLimit(512, 0.75, "bytes")
    with pytest.raises(ClientOverShare):
        limit.check("a", 400)
    limit.check("a", 380)
    limit.take("a", 380)
    with pytest.raises(ClientOverShare):
        limit.check("a", 132)
    limit.check("b", 90)


def test_a_client_with_more_than_its_share_is_refused_before_it_takes_more() -> None:
    limit = SharedLimit(8, 0.5, "bytes")
    limit.take("a", 20)
    with pytest.raises(ClientOverShare):
        limit.check_held("a")
    limit.take("b")
    limit.check_held("b")
    with pytest.raises(Overloaded, match="the limit of 8 bytes is reached"):
        limit.check("b", 1)


def test_a_block_holds_one_until_it_ends_also_with_an_error() -> None:
    limit = SharedLimit(1, 1, "slots")

    def run(client: str) -> None:
        with limit.hold(client):
            run("b")

    with pytest.raises(Overloaded):
        run("a")
    assert limit.used == 0
