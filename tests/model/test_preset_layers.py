"""The gated layers of the paper's models: before every language-model layer, every fourth, and every seventh."""

from __future__ import annotations

import pytest

from model.describe import PRESETS


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("flamingo-3b", tuple(range(24))),
        ("flamingo-9b", (0, 4, 8, 12, 16, 20, 24, 28, 32, 36)),
        ("flamingo-80b", (0, 7, 14, 21, 28, 35, 42, 49, 56, 63, 70, 77)),
    ],
)
def test_gated_layers_are_those_of_the_paper(name: str, layers: tuple[int, ...]) -> None:
    assert PRESETS[name].gated_layers == layers
