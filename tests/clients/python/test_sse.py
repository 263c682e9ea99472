"""Tests of the event parser with all line endings, and with bytes split at any position."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flamboyance_client.sse import EventParser

STREAM = ": hello\n\ndata: one\n\nid: 7\nevent: x\ndata:two\ndata: lines \u2028 é\n\n: quiet\ndata: [DONE]\n\n"
EVENTS = ["one", "two\nlines \u2028 é", "[DONE]"]


def parse(pieces: list[bytes]) -> list[str]:
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@given(cuts=st.lists(st.integers(0, 120), max_size=12).map(sorted))
def test_events_do_not_depend_on_the_splits(end: str, cuts: list[int]) -> None:
    data = STREAM.replace("\n", end).encode()
    edges = [0, *cuts, len(data)]
    assert parse([data[a:b] for a, b in pairwise(edges)]) == EVENTS


def test_lone_carriage_returns_end_lines() -> None:
    # The last event is incomplete until its last CR is known not to be the first half of a CRLF.
    assert parse([STREAM.replace("\n", "\r").encode(), b"\n"]) == EVENTS


def test_an_incomplete_event_is_not_returned() -> None:
    assert parse([b"data: one\n\ndata: tw"]) == ["one"]
