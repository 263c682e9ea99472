"""Prompts whose shots attend alone: the reference's log-probabilities, and spans that are computed once, in any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.wire import Abort
from tests.engine_client import (
    CONFIG,
    Prompt,
    assert_all_released,
    assert_equals_reference,
    client,
)
from tests.tiny_models import FAMILIES, Family

TOLERANCE = 1e-5
ALONE = Prompt(((-1, 3), (0, 5), (1, 4), (2, 9), (3, 2)), shots_attend="alone")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_prompt(family: Family) -> None:
    answer = client(family)
    answer.engine.add(ALONE.request("a"))
    answer.run()
    assert_equals_reference(family, ALONE, answer, "a", tolerance=TOLERANCE)
    assert_all_released(answer.engine)
