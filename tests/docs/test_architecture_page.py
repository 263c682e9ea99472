"""Tests that docs/architecture.md is true: its folders, files and tests exist, and its forward pass is the code.

`source_files.txt` lists every Python file outside `tests`, so that a change of the structure shows in a diff.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LISTED = Path(__file__).with_name("source_files.txt").read_text(encoding="utf-8").splitlines()
ROOMS = ("flamboyance", "kernels", "model", "server", "training", "evaluation", "clients", "bench")


def code_spans(text: str) -> list[str]:
    """Return the texts in backticks, blocks of code left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


ROWS = [line for line in section("Folders").splitlines() if line.startswith("| `")]
FOLDERS = [folder for row in ROWS for folder in code_spans(row.split("|")[1])]
PATHS = sorted({span for span in code_spans(PAGE) if re.fullmatch(r"[\w./]*/[\w./]*", span)})
TESTS = sorted({span for span in code_spans(PAGE) if re.fullmatch(r"test_\w+", span)})


def source_files() -> list[str]:
    files = [path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return sorted(file for file in files if "/build/" not in file and not file.endswith("__init__.py"))


def test_the_page_names_folders_paths_and_tests() -> None:
    assert len(FOLDERS) > 20
    assert len(PATHS) > 10
    assert len(TESTS) > 20


def test_every_folder_with_code_has_a_sentence() -> None:
    folders = {str(Path(file).parent.as_posix()) for file in source_files()}
    folders = {"clients/python" if folder.startswith("clients/python") else folder for folder in folders}
    assert folders <= set(FOLDERS), sorted(folders - set(FOLDERS))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_exists(folder: str) -> None:
    assert (ROOT / folder).is_dir()


def test_the_list_of_source_files_is_complete() -> None:
    missing, gone = set(source_files()) - set(LISTED), set(LISTED) - set(source_files())
    assert source_files() == LISTED, f"source_files.txt lacks {sorted(missing)} and lists {sorted(gone)}"


@pytest.mark.parametrize("path", PATHS)
def test_a_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("test", TESTS)
def test_a_test_exists(test: str) -> None:
    files = [file for folder in ("tests", "deploy/tests") for file in (ROOT / folder).rglob("test_*.py")]
    assert any(f"def {test}(" in file.read_text(encoding="utf-8") for file in files)


def test_the_forward_pass_is_the_code() -> None:
    (documented,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    code = re.sub(r"^ {8}", "", (ROOT / "model" / "flamingo.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert documented in code
