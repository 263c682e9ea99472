"""Tests of one item in place of a list, of both clients: it is taken as one item, or refused before anything is sent."""

from __future__ import annotations

import pytest

from flamboyance_client import Client
from tests.clients.python.test_stored import SET, exchange


def test_a_text_is_one_id() -> None:
    for ids, sent in (("12", b"id=12"), (["1", "2"], b"id=1%2C2")):
        request, _ = exchange(lambda c, ids=ids: c.support_sets.remove("pets", ids), SET)
        assert (request.method, request.url.query) == ("DELETE", sent)


def test_several_ids_in_a_text_are_refused() -> None:
    with Client("http://nowhere") as client, pytest.raises(ValueError, match="'a,b' is not the id of an example"):
        client.support_sets.remove("pets", "a,b")
