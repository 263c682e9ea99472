"""The paper's presets build without memory, and the parameters of their parts match the published figures."""

from __future__ import annotations

import pytest

from model.config import ConfigError
from model.describe import DOES_NOT_FOLLOW, PRESETS, PUBLISHED, find, parameters, table


@pytest.mark.parametrize("name", PRESETS)
def test_parts_are_near_the_published_figures(name: str) -> None:
    counted = parameters(PRESETS[name])
    for part, number in counted.items():
        ratio = number / PUBLISHED[name][part]
        if (name, part) in DOES_NOT_FOLLOW:
            assert abs(ratio - 1) > 0.1  # else the mark would be wrong
        else:
            assert abs(ratio - 1) < 0.1, (name, part, ratio)


def test_the_table_marks_figures_that_do_not_follow() -> None:
    assert "10,000 *" in table(PRESETS["flamingo-80b"])
    assert "194" in table(PRESETS["flamingo-3b"])


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="flamingo-3b, flamingo-9b, flamingo-80b"):
        find("flamingo-4b")
