"""The file of a run: a line of JSON about the machine, then a line per row, written as soon as the row is known.

The same command continues an interrupted run: rows in the file are not measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from kernels.bench.measure import WRONG, Result
from kernels.bench.task import Outcome, Task

Key: TypeAlias = tuple[str, str, str]
# folders with the code that the stages run; an installation without a clone has only the first
SOURCES = (
    "kernels/**/*.py",
    "model/**/*.py",
    "server/engine/**/*.py",
    "bench/whole_model.py",
    "bench/published_models.py",
)


class JournalError(ValueError):
    """A file that is not from this benchmark, or is from another machine; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The outcome of a task: a value, or the reason why there is none."""

    stage: str
    case: str
    name: str  # of the implementation
    value: float | None = None
    unit: str = "us"
    num_bytes: float = 0.0
    flops: float = 0.0
    note: str = ""
    failure: str | None = None

    @classmethod
    def of(cls, task: Task, outcome: Outcome) -> Row:
        fields = asdict(outcome) if isinstance(outcome, Result) else {"failure": outcome.reason}
        return cls(stage=task.stage, case=task.case, name=task.name, **fields)

    @property
    def key(self) -> Key:
        return self.stage, self.case, self.name

    @property
    def is_wrong(self) -> bool:
        return self.note.startswith(WRONG)


class Journal:
    """The rows of a file, which is created if it does not exist. `about` must be that of the run that began it.

    A file of another run or of another kind raises `JournalError` and is left as it is.
    """

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        self._file = file
        self.rows: dict[Key, Row] = {}
        if text := self._text():
            whole = text[: text.rfind("\n") + 1]
            about_line, *rows = whole.splitlines() or [text]
            self._check(about_line, about)
            self.rows = {row.key: row for row in map(self._row, rows)}
            os.truncate(file, len(whole.encode()))  # removes an incomplete last line
        else:
            self._append({"about": dict(about)})

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        self._append(asdict(row))

    def forget_failures(self) -> None:
        """Forget the rows that failed, so that they are measured again; the last line of a row counts."""
        self.rows = {key: row for key, row in self.rows.items() if row.failure is None}

    def in_order(self, tasks: Iterable[Task]) -> list[Row]:
        """Return the rows of these tasks that exist."""
        return [self.rows[task.key] for task in tasks if task.key in self.rows]

    def _text(self) -> str:
        """Return the text of the file, or an empty one if there is no file yet."""
        try:
            return self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except UnicodeDecodeError:
            raise self._foreign() from None

    def _foreign(self) -> JournalError:
        return JournalError(f"{self._file} is not a file of this benchmark; name another one with --out")

    def _check(self, line: str, about: Mapping[str, Any]) -> None:
        value = _json(line)
        begun = value.get("about") if isinstance(value, dict) else None
        if not isinstance(begun, dict):
            raise self._foreign()
        if name := next((name for name in about if begun.get(name) != about[name]), None):
            raise JournalError(
                f"{self._file} has {name} {begun.get(name)!r}, and this run has {about[name]!r}; "
                "name another file with --out"
            )

    def _row(self, line: str) -> Row:
        try:
            return Row(**_json(line))
        except TypeError:
            raise JournalError(f"{self._file} has a line that is not a row of this benchmark: {line[:80]}") from None

    def _append(self, value: Mapping[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())


def source_digest(root: Path) -> str:
    """Return a hash of the code that is measured, so that a run continues only with rows of the same code."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in SOURCES for file in root.glob(pattern)}):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
