"""The README names only files, commands and routes that exist, and the accuracies of the model card."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.server.test_docs import API

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (ROOT / "model" / "zoo" / "README.md").read_text(encoding="utf-8")
LINKS = sorted(set(re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', README)))
MODULES = sorted(set(re.findall(r"python -m ([\w.]+)|`((?:bench|evaluation)\.\w+)", README)))
TESTS = sorted(set(re.findall(r"`(tests/[\w/.]+)`", README)))
ROUTES = sorted(set(re.findall(r"`(/v1/[^`]+)`", README)))


@pytest.mark.parametrize("path", sorted({a or b for a, b in LINKS} | set(TESTS)))
def test_a_linked_file_exists(path: str) -> None:
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("module", sorted({a or b for a, b in MODULES}))
def test_a_command_exists(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_is_in_the_reference(route: str) -> None:
    assert route.replace("{id}", "{support_set}") in API


def test_the_limits_are_a_section_of_the_model_card() -> None:
    assert "model/zoo/README.md#limits" in README
    assert "\n## Limits\n" in CARD


@pytest.mark.parametrize("domain", ["drawings", "photographs"])
def test_accuracies_are_those_of_the_model_card(domain: str) -> None:
    likeness = CARD[CARD.index("### Likeness") :]
    card = [first_row(CARD, rf"{domain}, 5-way, {shots} .*?") for shots in (1, 2, 5)]
    model, features = zip(*((row[0].split()[0], row[1].split()[0]) for row in card), strict=True)
    assert tuple(first_row(README, f"{domain}, language model in context")) == model
    assert tuple(first_row(README, f"{domain}, encoder's features")) == features
    card = [first_row(likeness, rf"{domain}, 5-way, {shots} .*?") for shots in (1, 2, 5)]
    assert tuple(row[0].split()[0] for row in card) == features
    assert tuple(first_row(README, rf"{domain}, \[likeness\].*?")) == tuple(row[1].split()[0] for row in card)


def first_row(text: str, name: str) -> list[str]:
    """Return the cells after the name of the first table row of this name, a pattern."""
    row, *_ = re.findall(rf"^\| {name} \| (.*) \|$", text, flags=re.MULTILINE)
    return str(row).split(" | ")
