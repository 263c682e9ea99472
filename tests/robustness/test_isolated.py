"""A crash in a child process is a result, and the inputs after it are tried."""

from __future__ import annotations

import os
import random

from bench.fuzz import isolated
from bench.fuzz.isolated import Tally, Try, rng_of
from bench.table import Report

SEED = 27


def _crash_at_a_seventh() -> Try:
    def attempt(rng: random.Random) -> str | None:
        draw = rng.randrange(7)
        if draw == 0:
            os._exit(3)
        return "six" if draw == 6 else None

    return attempt


def _leak() -> Try:
    held: list[bytes] = []

    def attempt(_rng: random.Random) -> str | None:
        held.append(b"." * 2**18)
        return None

    return attempt


def test_memory_that_grows_with_the_inputs_is_a_missed_bound() -> None:
    report = isolated.run(_leak, 3 * isolated.BATCH, SEED).report(Report("", {}))
    assert [bar.name for bar in report.bars if not bar.is_met] == ["growth of memory in MiB"]


def test_crashes_and_failures_are_counted_and_the_rest_is_tried() -> None:
    draws = [rng_of(SEED, number).randrange(7) for number in range(12)]
    tally = isolated.run(_crash_at_a_seventh, len(draws), SEED)
    assert tally.num_ends == draws.count(0) == 1
    assert tally.num_inputs == len(draws)
    assert tally.counts == {"the process ended with 3": 1, "six": draws.count(6)}
    assert tally.numbers["the process ended with 3"] == [draws.index(0)]


def test_failures_are_reported_with_their_first_inputs() -> None:
    tally = Tally()
    for number in (4, 7, 9, 11):
        tally.add("wrong", number)
    assert tally.counts == {"wrong": 4}
    assert tally.numbers == {"wrong": [4, 7, 9]}
