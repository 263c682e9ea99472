"""docs/architecture.md says only what is there: each file, folder and test that it names exists, its code is the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]


def names(text: str) -> list[str]:
    """What stands in backticks, but for blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


ROOMS = [(names(folder)[0], file) for folder, _, files in ROWS for file in names(files) if re.fullmatch(r"\w+", file)]
PATHS = sorted(
    {name for name in names(PAGE) if re.fullmatch(r"[\w./]*/[\w./]*", name)} - {folder for folder, _ in ROOMS}
)
TESTS = sorted({name for name in names(PAGE) if re.fullmatch(r"test_\w+", name)})


def test_the_page_is_read() -> None:
    assert {folder.split("/")[0] for folder, _ in ROOMS} == {
        "kernels",
        "model",
        "server",
        "training",
        "evaluation",
        "clients",
        "bench",
    }
    assert len(ROOMS) > 60
    assert len(PATHS) > 10
    assert len(TESTS) > 20


@pytest.mark.parametrize(("folder", "file"), ROOMS, ids=[f"{folder}/{file}" for folder, file in ROOMS])
def test_a_file_of_the_map_exists(folder: str, file: str) -> None:
    assert (ROOT / folder / f"{file}.py").is_file()


@pytest.mark.parametrize("path", PATHS)
def test_a_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("test", TESTS)
def test_a_test_exists(test: str) -> None:
    assert any(f"def {test}(" in file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))


def test_the_forward_is_the_forward() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    code = re.sub(r"^ {8}", "", (ROOT / "model" / "flamingo.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert shown in code
