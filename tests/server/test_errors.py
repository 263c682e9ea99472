"""Every error states when it occurs, and has a code of its own."""

from __future__ import annotations

import msgspec

from server.errors import InvalidRequest, ServerError


def subclasses(root: type[ServerError]) -> list[type[ServerError]]:
    return [root, *(descendant for child in root.__subclasses__() for descendant in subclasses(child))]


def test_each_error_says_when_it_occurs() -> None:
    assert len(subclasses(ServerError)) > 20
    assert [kind for kind in subclasses(ServerError) if not kind.__dict__["__doc__"]] == []


def test_each_error_has_a_different_code() -> None:
    every = subclasses(ServerError)
    assert len({kind.code for kind in every}) == len(every)


def test_a_refusal_can_be_sent_whatever_text_it_repeats() -> None:
    body = InvalidRequest("unknown \ud800", param="a\udfff" * 10_000).body()
    assert msgspec.json.decode(msgspec.json.encode(body))["error"]["message"] == "unknown ?"
