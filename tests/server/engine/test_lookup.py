"""The tokens that a lookup predicts, and how many of them are proposed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.lookup import LENGTHS, WEIGHT, Lookup, num_worthwhile


def lookup(prompt: str, output: str = "") -> Lookup:
    reading = Lookup()
    reading.begin(map(ord, prompt))
    reading.extend(map(ord, output))
    return reading


def predicted(prompt: str, output: str = "", count: int = 4, ends: str = "") -> str:
    token_ids = lookup(prompt, output).predict(count, {ord(end) for end in ends})
    return "".join(map(chr, token_ids))


def test_what_followed_the_last_tokens_is_predicted() -> None:
    assert predicted("a red cat. a red") == " cat"
    assert predicted("a red cat. ", "a red") == " cat"
    assert predicted("a red cat. a red", count=2) == " c"
    assert predicted("a red cat. a blue") == ""
    assert predicted("a") == predicted("") == ""


def test_the_longest_end_is_first_and_then_its_last_place() -> None:
    assert predicted("abcX zbcY abc", count=1) == "X"
    assert predicted("abcX abcY abc", count=1) == "Y"
    assert predicted("abX cbY ab", count=1) == "X"
    assert predicted("aX bY a", count=1) == ""  # an end of one token says too little


def test_what_repeats_itself_is_predicted_to_go_on() -> None:
    assert predicted("xyxyx", count=5) == "yxyxy"
    assert predicted("zaaaa", count=3) == "aaa"


def test_a_prediction_ends_before_a_token_that_ends_or_is_never_sampled() -> None:
    assert predicted("ab12|34 ab", ends="|") == "12"
    assert predicted("ab|34 ab", ends="|") == ""


def test_hits_are_counted_whether_or_not_tokens_were_proposed() -> None:
    assert lookup("a red cat. a red").hit_share == 0
    assert lookup("a red cat. a red", " ").hit_share == WEIGHT
    assert lookup("a red cat. a red", "x").hit_share == 0
    single, hit = lookup("a red cat. a red"), lookup("a red cat. a red", " ca").hit_share
    for token in " ca":
        single.extend([ord(token)])
    assert single.hit_share == hit
    single.extend([ord("x")])
    assert 0 < single.hit_share < hit
    # after a miss nothing is predicted, so that a token after it counts as neither
    assert lookup("a red cat. a red", " cxx").hit_share == pytest.approx(WEIGHT * (2 - WEIGHT) * (1 - WEIGHT))


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_a_prediction_has_the_same_end_before_it(prompt: list[int], output: list[int]) -> None:
    reading = Lookup()
    reading.begin(prompt)
    reading.extend(output)
    whole = [*prompt, *output]
    assert len(reading) == len(whole)
    ends = {tuple(whole[-length:]) for length in LENGTHS}
    expected = {
        whole[at]
        for at in range(len(whole))
        for length in LENGTHS
        if at >= length and tuple(whole[at - length : at]) in ends
    }
    first = reading.predict(1, ())
    assert set(first) <= expected
    assert bool(first) == bool(expected)


def test_tokens_are_proposed_as_long_as_they_are_accepted_more_often_than_they_cost() -> None:
    assert num_worthwhile(0.0, 0.0, 8) == 0
    assert num_worthwhile(0.5, 0.6, 8) == 0
    assert num_worthwhile(0.5, 0.4, 8) == 1
    assert num_worthwhile(0.5, 0.2, 8) == 2
    assert num_worthwhile(0.9, 0.01, 8) == 8
    assert num_worthwhile(0.9, 0.01, 0) == num_worthwhile(0.9, 0.01, -1) == 0


@given(st.floats(0, 1), st.floats(0, 4), st.integers(0, 16))
def test_proposed_tokens_cost_at_most_as_much_as_a_token(share: float, cost: float, limit: int) -> None:
    count = num_worthwhile(share, cost, limit)
    assert 0 <= count <= limit
    assert count * cost <= 1
    assert not count or share**count > cost
