"""The page of security names tests that exist, and every point has one or a reason."""

from __future__ import annotations

import re
from pathlib import Path

from deploy.supply.ages import MAX_MONTHS
from deploy.supply.lock import read_lock

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
TABLE = PAGE[PAGE.index("## Security properties") : PAGE.index("## Old dependencies")]
POINTS = [line.strip("|").split("|") for line in TABLE.splitlines() if line.startswith("| ") and "---" not in line][1:]
HEADINGS = [point for point, held_by in POINTS if not held_by.strip()]


def names_of_tests() -> set[str]:
    files = [file for folder in ("tests", "deploy", "clients") for file in (ROOT / folder).rglob("test_*.py")]
    return {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))}


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 40
    assert named <= (known := names_of_tests()), sorted(named - known)


def test_every_point_has_a_test_or_a_reason() -> None:
    assert len(POINTS) - len(HEADINGS) == 42
    assert all(point.strip().startswith("**") for point in HEADINGS)


def test_the_old_dependencies_are_locked_and_the_threshold_is_that_of_the_command() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE[PAGE.index("## Old dependencies") :].splitlines()]
    versions = {row[0]: row[1] for row in rows if len(row) == 5 and row[0] != "package"}
    assert versions
    assert versions.items() <= {entry.name: entry.version for entry in read_lock("all")}.items()
    assert f"in the {MAX_MONTHS} months before" in PAGE
