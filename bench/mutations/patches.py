"""Patches that break the code on purpose: data in the YAML files of this folder, each with the tests that must fail.

A file maps names to patches, with these keys:

breaks    a sentence that says what is wrong with the patched code
file      the patched file
old, new  the text that is replaced, which occurs exactly once in the file, and its replacement
tests     files or node ids of pytest
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
KEYS = {"breaks", "file", "old", "new", "tests"}


class PatchError(ValueError):
    """A patch that cannot be applied, or data that are not a patch; the message names the patch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def patched(self, root: Path) -> str:
        """Return the patched text of the file. Raises `PatchError` unless the old text occurs exactly once."""
        path = root / self.file
        if not path.is_file():
            raise PatchError(f"{self.name}: there is no file {self.file}")
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise PatchError(f"{self.name}: the old text occurs {count} times in {self.file}, must occur once")
        return text.replace(self.old, self.new)


def read_patches(folder: Path = FOLDER) -> list[Patch]:
    """Return all patches of a folder, by file and in the order of each file. Raises `PatchError`."""
    patches = [patch for file in sorted(folder.glob("*.yaml")) for patch in _read(file)]
    names = [patch.name for patch in patches]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PatchError(f"two patches have the name {', '.join(twice)}")
    return patches


def _read(file: Path) -> Iterator[Patch]:
    entries: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    for name, values in entries.items():
        if values.keys() != KEYS:
            raise PatchError(f"{file.name}: {name} has the keys {sorted(values)}, must have {sorted(KEYS)}")
        yield Patch(name=name, **{**values, "tests": tuple(values["tests"])})


def check(patches: Iterable[Patch], root: Path) -> None:
    """Raise `PatchError` for the first patch that does not apply, changes nothing, or leaves no valid Python."""
    for patch in patches:
        text = patch.patched(root)
        if patch.old == patch.new:
            raise PatchError(f"{patch.name}: the new text equals the old one")
        if missing := [test for test in patch.tests if not (root / test.partition("::")[0]).exists()]:
            raise PatchError(f"{patch.name}: there is no test {', '.join(missing)}")
        if not patch.tests:
            raise PatchError(f"{patch.name}: no test is named")
        if patch.file.endswith(".py"):
            _parse(patch, text)


def _parse(patch: Patch, text: str) -> None:
    try:
        ast.parse(text)
    except SyntaxError as error:
        raise PatchError(f"{patch.name}: {patch.file} is no longer Python: {error}") from None
